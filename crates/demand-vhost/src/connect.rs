// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connects to the socket of a back-end, in bounded time, and until another thread hangs up.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Operation;
use crate::{Error, ErrorKind, HangUp, Result};

/// Interval between attempts.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Number of attempts at a socket on which no process listens (yet).
const UNHEARD: u32 = 10;

/// Creates a socket for a connection, and the handle that closes it, even before it is connected.
pub(crate) fn unconnected(socket: &Path) -> Result<(UnixStream, HangUp)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let made = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let stream = made.map(UnixStream::from).map_err(io::Error::from);
    let both = stream.and_then(|stream| Ok((stream.try_clone()?, stream)));
    let (ours, theirs) = both.map_err(|error| refused(socket, ErrorKind::Connect(error)))?;
    Ok((ours, HangUp::new(theirs, socket)))
}

/// Connects `stream`. Retries for a short time if the back-end has created its socket but does not
/// listen on it yet, and for `patience` while so many front-ends wait for it that the system
/// accepts no other.
///
/// # Errors
///
/// [`ErrorKind::Connect`], [`ErrorKind::PathTooLong`], [`ErrorKind::Silent`], and
/// [`ErrorKind::Disconnected`] if `hang_up` closes the connection meanwhile.
pub(crate) fn connect(
    stream: &UnixStream,
    socket: &Path,
    patience: Duration,
    hang_up: &HangUp,
) -> Result<()> {
    let refused = |kind| refused(socket, kind);
    let address = SocketAddrUnix::new(socket).map_err(|error| match error {
        Errno::NAMETOOLONG => refused(ErrorKind::PathTooLong),
        error => refused(ErrorKind::Connect(error.into())),
    })?;
    let (begun, mut unheard) = (Instant::now(), 0);
    loop {
        match rustix::net::connect(stream, &address) {
            Ok(()) => break,
            Err(Errno::CONNREFUSED) if unheard < UNHEARD => unheard += 1,
            // Its queue of connections is full. A call that blocked could not be ended.
            Err(Errno::AGAIN) if begun.elapsed() < patience => {}
            Err(Errno::AGAIN) => return Err(refused(ErrorKind::Silent { patience })),
            Err(error) => return Err(refused(ErrorKind::Connect(error.into()))),
        }
        if hang_up.was_asked() {
            return Err(refused(ErrorKind::Disconnected));
        }
        thread::sleep(RETRY_EVERY);
    }
    stream.set_nonblocking(false).map_err(|error| refused(ErrorKind::Connect(error)))
}

fn refused(socket: &Path, kind: ErrorKind) -> Error {
    Error::new(socket, Operation::Connect, kind)
}
