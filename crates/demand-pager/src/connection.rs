// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections to a pager, up to the point where it takes faults.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::fcntl_get_seals;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect as connect_to, recvmsg, sendmsg, socket_with,
};

use crate::error::{PagerErrorKind, lost, violation};
use crate::location::Location;
use crate::protocol::{Call, GREETING, Greeting, HEADER, Head, NO_TAG, VERSION, read_text};

/// A connection that takes faults.
pub(crate) struct Connected {
    pub(crate) stream: UnixStream,
    pub(crate) image: Image,
    pub(crate) staging: Option<Staging>,
    /// Whether the pager takes bitmaps of missing pages.
    pub(crate) watches: bool,
}

/// The image that a pager serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Size in bytes.
    pub(crate) size: u64,
    pub(crate) generation: [u8; 16],
}

impl Image {
    /// Checks that another connection reaches the same image.
    pub(crate) fn check(&self, now: &Image) -> Result<(), PagerErrorKind> {
        let what = match (self.size == now.size, self.generation == now.generation) {
            (false, _) => "size",
            (true, false) => "generation id",
            (true, true) => return Ok(()),
        };
        Err(PagerErrorKind::Changed { what })
    }
}

/// The memory in which a pager puts answers.
pub(crate) struct Staging {
    pub(crate) memory: File,
    /// Size in bytes.
    pub(crate) size: u64,
}

/// Connects and agrees on the image, within the time limit.
pub(crate) fn connect(location: &Location, after: Duration) -> Result<Connected, PagerErrorKind> {
    let failed = |error: rustix::io::Errno| PagerErrorKind::Connect { source: error.into() };
    let address = SocketAddrUnix::new(location.socket()).map_err(failed)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.map_err(failed)?;
    // The first one also limits the wait for a pager that accepts no connection.
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(after)).map_err(failed)?;
    }
    connect_to(&socket, &address).map_err(failed)?;
    let mut stream = UnixStream::from(socket);
    let in_time = |error: PagerErrorKind| match error {
        // The two names of a timeout.
        PagerErrorKind::Lost { source }
            if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            PagerErrorKind::Silent { after }
        }
        error => error,
    };
    let (greeting, memory) = agree(&mut stream, location.name()).map_err(in_time)?;
    stream.set_read_timeout(None).map_err(lost)?;
    stream.set_write_timeout(None).map_err(lost)?;
    let staging = staging(greeting.staging, memory)?;
    let image = Image { size: greeting.size, generation: greeting.generation };
    Ok(Connected { stream, image, staging, watches: greeting.watches })
}

fn agree(
    stream: &mut UnixStream,
    name: &str,
) -> Result<(Greeting, Option<OwnedFd>), PagerErrorKind> {
    let mut call = Vec::new();
    Call::Handshake { version: VERSION, name: name.to_owned() }.encode(&mut call);
    stream.write_all(&call).map_err(lost)?;
    let mut head = [0; HEADER];
    let (read, mut passed) = receive(stream, &mut head).map_err(lost)?;
    if read == 0 {
        return Err(lost(io::ErrorKind::UnexpectedEof.into()));
    }
    stream.read_exact(&mut head[read..]).map_err(lost)?;
    match Head::read(&head, stream)? {
        Head::Handshake => {}
        Head::Error { tag: NO_TAG, retry, len } => {
            let text = read_text(stream, len).map_err(lost)?;
            return Err(PagerErrorKind::Refused { retry, text });
        }
        _ => return violation("it does not begin with a handshake"),
    }
    let mut body = [0; GREETING];
    stream.read_exact(&mut body).map_err(lost)?;
    let Some(greeting) = Greeting::decode(&body) else {
        return violation("its handshake has an unknown flag");
    };
    if greeting.version != VERSION {
        return Err(PagerErrorKind::Version { theirs: greeting.version });
    }
    if i64::try_from(greeting.size).is_err() {
        return violation("its image is larger than any file");
    }
    let memory = passed.pop();
    if !passed.is_empty() {
        return violation("its handshake passes more than one file descriptor");
    }
    Ok((greeting, memory))
}

/// Receives the beginning of a message, and the file descriptors that are passed with it.
pub(crate) fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut passed = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            passed.extend(descriptors);
        }
    }
    Ok((message.bytes, passed))
}

/// Sends messages, and passes a file with the first byte.
pub(crate) fn send(mut stream: &UnixStream, bytes: &[u8], file: Option<&File>) -> io::Result<()> {
    let Some(file) = file else { return stream.write_all(bytes) };
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    stream.write_all(&bytes[sent..])
}

/// Checks a staging area.
fn staging(size: Option<u64>, memory: Option<OwnedFd>) -> Result<Option<Staging>, PagerErrorKind> {
    let (size, memory) = match (size, memory) {
        (None, None) => return Ok(None),
        (Some(size), Some(memory)) => (size, memory),
        (None, Some(_)) => return violation("its handshake passes a file without a staging area"),
        (Some(_), None) => return violation("its handshake passes no staging area"),
    };
    // Other files may block a read, or end it with a signal.
    if fcntl_get_seals(&memory).is_err() {
        return violation("its staging area is not a memfd");
    }
    let memory = File::from(memory);
    match memory.metadata() {
        Ok(metadata) if metadata.len() >= size => Ok(Some(Staging { memory, size })),
        _ => violation("its staging area is smaller than it says"),
    }
}
