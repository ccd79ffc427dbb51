// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A time limit for answers that depend on nothing but the back-end.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Runs `work`, which talks through `stream`, and shuts the connection down if it takes longer
/// than `patience`: that ends a wait in `work`. Returns what `work` did, and whether the time was
/// up before.
///
/// The vhost crate waits for as many bytes as the protocol says, however long, and takes a
/// time-out of the socket for a reason to go on waiting.
pub(crate) fn within<T>(
    patience: Duration,
    stream: &UnixStream,
    work: impl FnOnce() -> T,
) -> io::Result<(T, bool)> {
    let late = AtomicBool::new(false);
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = || {
            // Moved in, so that the sender's end below is what ends this.
            let wait = wait;
            if wait.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                late.store(true, Ordering::Release);
                // It fails only if the connection is down already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        thread::Builder::new().name("vhost-deadline".into()).spawn_scoped(scope, watch)?;
        let result = work();
        drop(done);
        Ok((result, late.load(Ordering::Acquire)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_wait_ends_in_time() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let watched = ours.try_clone().unwrap();
        let wait = || ours.read(&mut [0]).unwrap();
        assert_eq!(within(Duration::from_millis(20), &watched, wait).unwrap(), (0, true));
    }

    #[test]
    fn quick_work_is_left_alone() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (result, late) = within(Duration::from_secs(60), &ours, || 7).unwrap();
        assert_eq!((result, late), (7, false));
    }
}
