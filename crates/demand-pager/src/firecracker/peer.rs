// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handler's process, and the process that it takes for the VMM.
//!
//! Handlers learn the process at the other end of their socket from the kernel, and some of them
//! kill it when they fail. So a process of its own connects, and waits for its end.

use std::io::{self, IoSlice, PipeReader};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::staging::Staging;
use crate::error::PagerErrorKind;

/// Interval at which memory is swept.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// A handler with a mapping to fill.
pub(super) struct Peer {
    /// The process that connected, which does nothing else: `cat`, whose standard input is a pipe
    /// of this process. So it also ends with this process.
    child: Child,
    /// Readable when that process has ended.
    child_end: OwnedFd,
    /// Readable when the handler's process has ended, if that process is known.
    handler_end: Option<OwnedFd>,
    /// It stays open as Firecracker's does: some handlers end with it.
    connection: OwnedFd,
}

/// The end of a wait.
pub(super) enum Event {
    /// The source is closed.
    Closed,
    /// The handler has ended.
    HandlerEnded(io::Error),
}

impl Peer {
    /// Connects to a handler, and sends it a mapping.
    pub(super) fn connect(
        socket: &Path,
        staging: &Staging,
        after: Duration,
    ) -> Result<Peer, PagerErrorKind> {
        let failed = |source| PagerErrorKind::Connect { source };
        let local = |source| PagerErrorKind::Local { source };
        let address = SocketAddrUnix::new(socket).map_err(|error| failed(error.into()))?;
        let stream =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let stream = stream.map_err(|error| local(error.into()))?;
        // It also limits the wait for a handler that accepts no connection.
        set_socket_timeout(&stream, Timeout::Send, Some(after)).map_err(|e| local(e.into()))?;
        let (message, descriptor) = (staging.message(), staging.descriptor().map_err(local)?);
        let connecting = stream.try_clone().map_err(local)?;
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: the child of a process with threads makes two system calls, with memory that was
        // allocated before, and neither allocates nor locks.
        unsafe {
            command.pre_exec(move || send(&connecting, &address, &message, descriptor.as_fd()));
        }
        let mut child = command.spawn().map_err(failed)?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(child_end) => {
                let handler_end = handler_end(&stream);
                Ok(Peer { child, child_end, handler_end, connection: stream })
            }
            Err(error) => {
                end(&mut child);
                Err(local(error.into()))
            }
        }
    }

    /// Waits until the handler or the source has ended, and calls `sweep` meanwhile.
    pub(super) fn wait(&self, closed: &PipeReader, sweep: impl Fn()) -> Event {
        let limit = Timespec { tv_sec: SWEEP_EVERY.as_secs().cast_signed(), tv_nsec: 0 };
        loop {
            let handler_end = self.handler_end.as_ref().unwrap_or(&self.connection);
            let mut ends = [closed.as_fd(), self.child_end.as_fd(), handler_end.as_fd()]
                .map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN));
            let count = match poll(&mut ends, Some(&limit)) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Event::HandlerEnded(error.into()),
            };
            let happened = ends.map(|end| !end.revents().is_empty());
            match happened {
                [true, ..] => return Event::Closed,
                [_, true, _] => {
                    let text = "the handler has given up, or its peer was killed";
                    return Event::HandlerEnded(io::Error::other(text));
                }
                [_, _, true] => {
                    return Event::HandlerEnded(io::Error::other("the handler has ended"));
                }
                _ if count == 0 => sweep(),
                _ => {}
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Connects, and sends the message with the userfaultfd.
fn send(
    stream: &OwnedFd,
    address: &SocketAddrUnix,
    message: &str,
    descriptor: BorrowedFd<'_>,
) -> io::Result<()> {
    connect(stream, address)?;
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let message = [IoSlice::new(message.as_bytes())];
    sendmsg(stream, &message, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Returns a descriptor that is readable when the handler has ended: the process that listens.
fn handler_end(connection: &OwnedFd) -> Option<OwnedFd> {
    let handler = socket_peercred(connection).ok()?.pid;
    // A service manager listens for some handlers.
    if handler.is_init() { None } else { pidfd_open(handler, PidfdFlags::empty()).ok() }
}

/// Waits for a time, or until the source is closed. Returns whether it is.
pub(super) fn is_closed_within(closed: &PipeReader, time: Duration) -> bool {
    let mut end = [PollFd::from_borrowed_fd(closed.as_fd(), PollFlags::IN)];
    let limit = Timespec::try_from(time).ok();
    poll(&mut end, limit.as_ref()).is_ok_and(|count| count > 0)
}
