// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as a file descriptor, and waiting for file descriptors.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use crate::{Error, Result};

/// The signals SIGTERM and SIGINT, blocked in this thread and in all threads it starts.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals and opens the descriptor that reports them.
    pub fn block() -> Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set before the other calls change and read it;
        // signalfd creates a new descriptor, which has no other owner.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let e = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            if e != 0 {
                let source = io::Error::from_raw_os_error(e);
                return Err(Error::System { what: "block signals", source });
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(Error::last_os("open a signalfd"));
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Consumes the pending signals and returns whether any were pending.
    pub fn take(&self) -> bool {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        let mut any = false;
        // SAFETY: the buffer holds exactly one structure, and `size` is its size.
        while unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) } > 0 {
            any = true;
        }
        any
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Waits at most `patience` until one of `fds` reports one of its events, an error or a hang-up.
/// Returns the events of each, possibly none at all.
pub fn poll<const N: usize>(
    fds: [(RawFd, libc::c_short); N],
    patience: Option<Duration>,
) -> Result<[libc::c_short; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    let timeout = match patience {
        Some(patience) => i32::try_from(patience.as_millis()).unwrap_or(i32::MAX),
        None => -1,
    };
    // SAFETY: the array has N elements, and is exclusively borrowed during the call.
    if unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout) } < 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::System { what: "wait for events", source });
        }
        return Ok([0; N]);
    }
    Ok(fds.map(|fd| fd.revents))
}
