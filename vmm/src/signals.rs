// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The signals that end the process, and their mask.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// The signals that end a run.
pub(crate) const SIGNALS: [(libc::c_int, &str); 3] =
    [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")];

/// Whether the process ignores a signal, as one that `nohup` starts ignores SIGHUP.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null pointer means that the action is not changed, and the call writes the current
    // one if it succeeds, which is checked before it is read.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Ignores SIGUSR1, on which other programs, such as back-ends, report their counters: a script
/// that sends it to all of them must not end a VM.
pub(crate) fn ignore_reports() {
    // SAFETY: ignoring a signal installs no handler, so no code of this process runs on it.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
}

/// Blocks the signals that end a run in this thread, and in the threads that it starts later.
/// Returns the set of these signals. An ignored signal is not among them: Linux would queue it if
/// it were blocked.
///
/// # Errors
///
/// If the system call fails.
pub(crate) fn block_signals() -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set before it is used, and the signal numbers are
    // valid.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for (signal, _) in SIGNALS.into_iter().filter(|(signal, _)| !is_ignored(*signal)) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    };
    // SAFETY: the set is initialised, and a null pointer means that the old mask is not returned.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_do_not_end_the_process() {
        ignore_reports();
        // SAFETY: the signal is ignored, or ends this test.
        assert_eq!(unsafe { libc::raise(libc::SIGUSR1) }, 0);
    }

    #[test]
    fn ignored_signals_stay_ignored() {
        // SAFETY: ignoring a signal runs no handler.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let set = block_signals().unwrap();
        // SAFETY: the set is initialised, and the signal numbers are valid.
        let [hangup, terminate] = [libc::SIGHUP, libc::SIGTERM]
            .map(|signal| unsafe { libc::sigismember(&set, signal) } == 1);
        assert!(!hangup && terminate);
    }
}
