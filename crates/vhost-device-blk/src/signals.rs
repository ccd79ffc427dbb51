// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as a file descriptor, and waiting for file descriptors.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use crate::{Error, Result};

/// The signals SIGTERM and SIGINT, blocked in this thread and all it starts.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals and opens the descriptor that reports them.
    pub fn block() -> Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set, which the other calls then change and read;
        // signalfd makes a new descriptor that nobody else owns.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let e = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            if e != 0 {
                let source = io::Error::from_raw_os_error(e);
                return Err(Error::System { what: "blocking signals", source });
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(Error::last_os("opening a signalfd"));
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Takes the pending signals and returns whether there were any.
    pub fn take(&self) -> bool {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        let mut any = false;
        // SAFETY: the buffer holds one structure, which is what is asked for.
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

/// Waits until one of `fds` has one of its events (or is in error or hung up), for `patience` at
/// most. Returns what happened on each, which may be nothing at all.
pub fn poll<const N: usize>(
    fds: [(RawFd, libc::c_short); N],
    patience: Option<Duration>,
) -> Result<[libc::c_short; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    let timeout = match patience {
        Some(patience) => i32::try_from(patience.as_millis()).unwrap_or(i32::MAX),
        None => -1,
    };
    // SAFETY: the array is as long as we say, and exclusively ours during the call.
    if unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout) } < 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::System { what: "waiting for events", source });
        }
        return Ok([0; N]);
    }
    Ok(fds.map(|fd| fd.revents))
}
