#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A pager that serves a file, or the files of a folder by their names.

usage: pager.py PATH SOCKET [--staging]

docs/pager-protocol.md describes the messages. With --staging, answers are put into a memfd.
"""

import collections
import hashlib
import os
import socket
import stat
import struct
import sys
import threading

VERSION = 1
HANDSHAKE, FAULT, RAISE, RELEASE = 0x20, 0x21, 0x22, 0x23
DATA, STAGED, ZERO, ERROR = 0x28, 0x29, 0x2A, 0x2B
HEADER = struct.Struct("<H6xQ")  # command, length of what follows
GREETING = struct.Struct("<HH4xQQ16s")  # version, flags, size, size of the staging area, id
FAULT_BODY = struct.Struct("<QQIBB2x")  # tag, offset, length, priority, path
LATER = 1  # the flag of an error that may pass
MOST = 128 << 10  # bytes of a fault
SLOTS = 64  # faults in the staging area


def frame(command, body):
    return HEADER.pack(command, len(body)) + body


def failure(tag, flags, text):
    return frame(ERROR, struct.pack("<QI4x", tag, flags) + text.encode()[:1024])


def receive(stream, length):
    """Returns so many bytes. Ends the connection's thread if the VMM has closed it."""
    parts = bytearray()
    while len(parts) < length:
        part = stream.recv(length - len(parts))
        if not part:
            sys.exit()
        parts += part
    return bytes(parts)


def open_image(path, name):
    """Opens the file, or the file of the folder that has the name."""
    if os.path.isdir(path):
        if os.path.isabs(name) or ".." in name.split("/"):
            raise OSError("the name leaves the folder")
        path = os.path.join(path, name)
    image = open(path, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(image.fileno()).st_mode):
        raise OSError("it is not a regular file")
    return image


class Connection:
    """The faults of a connection: one thread receives them, another one answers."""

    def __init__(self, stream, image, staging):
        self.stream, self.image, self.staging = stream, image, staging
        self.changed = threading.Condition()
        self.demand, self.fill = collections.deque(), collections.deque()
        self.closed = False
        self.free = list(range(SLOTS)) if staging is not None else []
        self.slots = {}  # of the tags whose bytes are in the staging area

    def run(self):
        threading.Thread(target=self.answer_all, daemon=True).start()
        try:
            while True:
                command, length = HEADER.unpack(receive(self.stream, HEADER.size))
                body = receive(self.stream, length)
                with self.changed:
                    self.take(command, body)
                    self.changed.notify()
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify()

    def take(self, command, body):
        if command == FAULT:
            tag, offset, length, priority, _path = FAULT_BODY.unpack(body)
            (self.demand if priority else self.fill).append((tag, offset, length))
        elif command == RAISE:
            (tag,) = struct.unpack("<Q", body)
            for fault in [fault for fault in self.fill if fault[0] == tag]:
                self.fill.remove(fault)
                self.demand.append(fault)
        elif command == RELEASE:
            (tag,) = struct.unpack("<Q", body)
            self.free.append(self.slots.pop(tag))
        else:
            sys.exit(f"pager.py: unknown command {command:#x}")

    def answer_all(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.demand or self.fill)
                if self.closed:
                    return
                fault = (self.demand or self.fill).popleft()
            try:
                self.stream.sendall(self.answer(*fault))
            except OSError:
                return  # The VMM is gone; its next connection asks again.

    def answer(self, tag, offset, length):
        try:
            content = os.pread(self.image.fileno(), length, offset)
        except OSError as error:
            return failure(tag, LATER, f"{error.strerror}; check the pager's storage")
        if len(content) != length:
            return failure(tag, LATER, "the image has shrunk; restore it")
        if not any(content):
            return frame(ZERO, struct.pack("<Q", tag))
        with self.changed:
            slot = self.free.pop() if self.free else None
            if slot is not None:
                self.slots[tag] = slot
        if slot is None:
            return frame(DATA, struct.pack("<Q", tag) + content)
        os.pwrite(self.staging, content, slot * MOST)
        return frame(STAGED, struct.pack("<QQ", tag, slot * MOST))


def serve(stream, path, with_staging):
    command, length = HEADER.unpack(receive(stream, HEADER.size))
    body = receive(stream, length)
    version, name = struct.unpack("<H", body[:2])[0], body[8:].decode()
    if command != HANDSHAKE or version != VERSION:
        return stream.sendall(failure(0, 0, "this pager speaks version 1 of the protocol only"))
    try:
        image = open_image(path, name)
    except OSError as error:
        text = error.strerror or error
        return stream.sendall(failure(0, 0, f"it has no image '{name}': {text}"))
    status = os.fstat(image.fileno())
    # The file must not change; if it is another one, then it says so.
    identity = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    identity = hashlib.sha256(identity.encode()).digest()[:16]
    flags, size, staging = 0, 0, None
    if with_staging:
        flags, size, staging = 1, SLOTS * MOST, os.memfd_create("staging")
        os.ftruncate(staging, size)
    greeting = GREETING.pack(VERSION, flags, status.st_size, size, identity)
    descriptors = [] if staging is None else [staging]
    socket.send_fds(stream, [frame(HANDSHAKE, greeting)], descriptors)
    Connection(stream, image, staging).run()


def serve_and_close(stream, *arguments):
    with stream:
        serve(stream, *arguments)


def main():
    paths = [argument for argument in sys.argv[1:] if argument != "--staging"]
    if len(paths) != 2:
        sys.exit("usage: pager.py PATH SOCKET [--staging]")
    path, address = paths
    # Left by a pager that was killed.
    if os.path.exists(address):
        os.unlink(address)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(128)
    while True:
        stream, _ = listener.accept()
        arguments = (stream, path, "--staging" in sys.argv)
        threading.Thread(target=serve_and_close, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
