// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket that the command line or the service manager gives.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use vhost_device_blk::Endpoint;

use crate::args::Args;

/// Error for a socket that cannot be taken from the command line or the environment.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// There is none.
    #[error(
        "cannot serve front-ends: no socket is given; use --socket-path PATH or --fd FDNUM, or \
         socket activation (LISTEN_FDS)"
    )]
    Missing,
    /// There are several.
    #[error(
        "cannot serve front-ends: the service manager passed {0} sockets (LISTEN_FDS); pass one"
    )]
    Several(usize),
    /// The variables of the service manager have no meaning.
    #[error(
        "cannot use the sockets of the service manager (LISTEN_FDS): {0}; correct its settings"
    )]
    Activation(io::Error),
    /// The process has inherited no such descriptor.
    #[error("cannot use --fd {number}: {source}; start this program with a socket there")]
    Descriptor {
        /// The number.
        number: u32,
        /// The reason.
        source: io::Error,
    },
}

/// Returns the socket. The process must not have opened any files yet, and must call this once: a
/// number on the command line then means an inherited descriptor.
pub(crate) fn choose(args: &Args) -> Result<Endpoint, SocketError> {
    if let Some(path) = &args.socket_path {
        return Ok(Endpoint::Path(path.clone()));
    }
    if let Some(number) = args.fd {
        let failed = |source| SocketError::Descriptor { number, source };
        let unusable = |why| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
        let fd = RawFd::try_from(number).map_err(|_| unusable("there is no such descriptor"))?;
        if fd < 3 {
            return Err(unusable("it is a standard stream"));
        }
        return take(fd).map_err(failed);
    }
    let mut passed = sd_notify::listen_fds().map_err(SocketError::Activation)?;
    match (passed.len(), passed.next()) {
        (1, Some(fd)) => take(fd).map_err(SocketError::Activation),
        (0, _) => Err(SocketError::Missing),
        (count, _) => Err(SocketError::Several(count)),
    }
}

/// Takes over an inherited descriptor. It is not passed to other programs.
fn take(fd: RawFd) -> io::Result<Endpoint> {
    // SAFETY: the call accesses no memory, and fails if the descriptor is not open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and no other code of this process owns it: `choose` is called
    // once, before the process opens any.
    Ok(Endpoint::Inherited(unsafe { OwnedFd::from_raw_fd(fd) }))
}
