// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as a file descriptor, and waiting for file descriptors.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use crate::error::{Error, Result};

/// The signals that end the daemon.
const ENDS: [(libc::c_int, &str); 3] =
    [(libc::SIGTERM, "SIGTERM"), (libc::SIGINT, "SIGINT"), (libc::SIGHUP, "SIGHUP")];

/// The signals SIGTERM, SIGINT, SIGHUP and SIGUSR1, blocked in this thread and in all threads it
/// starts. A signal that the process ignored before is not among them.
#[derive(Debug)]
pub(crate) struct Signals(OwnedFd);

/// The signals that were pending.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// The name of one that ends the daemon.
    pub(crate) end: Option<&'static str>,
    /// Whether one asks for the counters.
    pub(crate) stats: bool,
}

impl Signals {
    /// Blocks the signals and opens the descriptor that reports them.
    pub(crate) fn block() -> Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set before the other calls change and read it;
        // signalfd creates a new descriptor, which has no other owner.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let ends = ENDS.map(|(signal, _)| signal);
            for signal in ends.into_iter().chain([libc::SIGUSR1]) {
                // Linux would queue an ignored signal if it were blocked.
                if !is_ignored(signal) {
                    libc::sigaddset(set.as_mut_ptr(), signal);
                }
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            if error != 0 {
                let source = io::Error::from_raw_os_error(error);
                return Err(Error::System { what: "block signals", source });
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(Error::last_os("open a signalfd"));
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Consumes the pending signals and returns which they were.
    pub(crate) fn take(&self) -> Taken {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        let mut taken = Taken::default();
        // SAFETY: the buffer holds exactly one structure, and `size` is its size.
        while unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) } > 0 {
            // SAFETY: the host writes whole structures.
            let number = unsafe { info.assume_init() }.ssi_signo;
            let end = ENDS.iter().find(|(signal, _)| u32::try_from(*signal) == Ok(number));
            match end {
                Some((_, name)) => taken.end = Some(name),
                None => taken.stats = true,
            }
        }
        taken
    }
}

/// Returns whether the process ignores a signal, as one that `nohup` starts ignores SIGHUP.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null pointer means that the action is not changed, and the call writes the current
    // one if it succeeds, which is checked before it is read.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Waits at most `patience` until one of `fds` reports one of its events, an error or a hang-up.
/// Returns the events of each, possibly none at all. Negative descriptors are skipped.
pub(crate) fn poll<const N: usize>(
    fds: [(RawFd, libc::c_short); N],
    patience: Option<Duration>,
) -> Result<[libc::c_short; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    let timeout = match patience {
        // Rounded up, so that the caller does not spin during the last millisecond.
        Some(patience) => i32::try_from(patience.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
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
