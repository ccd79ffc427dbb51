// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A handle through which another thread watches and closes the connection to a back-end.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use demand_memory::OwnProcess;

use crate::error::Operation;
use crate::{Error, ErrorKind, Result};

/// A handle that closes a connection from another thread, which ends all waits of its
/// [`BackEnd`](crate::BackEnd). It can also check whether the connection is closed while the
/// `BackEnd` waits.
#[derive(Clone, Debug)]
pub struct HangUp {
    stream: Arc<UnixStream>,
    socket: Arc<Path>,
    asked: Arc<AtomicBool>,
    process: OwnProcess,
}

impl HangUp {
    pub(crate) fn new(stream: UnixStream, socket: &Path) -> Self {
        let process = OwnProcess::current();
        HangUp { stream: Arc::new(stream), socket: socket.into(), asked: Arc::default(), process }
    }

    /// Closes the connection, or ends the attempt to make it. Does nothing in a child process,
    /// whose parent uses the connection.
    pub fn hang_up(&self) {
        if !self.process.is_current() {
            return;
        }
        self.asked.store(true, Ordering::Release);
        // It fails only if the connection is down already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Returns whether this side has closed the connection, which may not exist yet.
    pub(crate) fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Returns whether either side has closed the connection.
    pub(crate) fn is_closed(&self) -> bool {
        let events = libc::POLLIN | libc::POLLRDHUP;
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events, revents: 0 };
        // SAFETY: the pointer and the count describe one valid entry.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        let gone = libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR;
        ready > 0 && poll.revents & gone != 0
    }

    /// Checks that the connection is open, as [`BackEnd::check`](crate::BackEnd::check) does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Disconnected`] if it is not.
    pub fn check(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::new(&*self.socket, Operation::Use, ErrorKind::Disconnected));
        }
        Ok(())
    }
}

impl AsRawFd for HangUp {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
