// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bounds waits for a back-end: by a time limit, or by the end of its connection.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::Waiter;

use crate::HangUp;

/// Interval at which the watching threads check the excuse or the connection.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Runs `work`, which communicates through the connection, and closes it if that takes longer than
/// `patience`, which ends any wait in `work`. Time in which the back-end is `excused` does not
/// count; after an excuse, the back-end again has the full time. Returns the result of `work`, and
/// whether the time limit was reached before `work` returned.
///
/// A timeout of the socket would not help: the vhost crate waits for all bytes that the protocol
/// requires, and retries after a timeout.
pub(crate) fn within<T>(
    patience: Duration,
    connection: &HangUp,
    excused: impl Fn() -> bool + Sync,
    work: impl FnOnce() -> T,
) -> io::Result<(T, bool)> {
    let late = AtomicBool::new(false);
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = || {
            // Moved in, so that dropping the sender below ends this loop.
            let wait = wait;
            let mut since = Instant::now();
            loop {
                let left = patience.saturating_sub(since.elapsed());
                if wait.recv_timeout(left.min(LOOK_EVERY)) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if excused() {
                    since = Instant::now();
                } else if since.elapsed() >= patience {
                    late.store(true, Ordering::Release);
                    return connection.hang_up();
                }
            }
        };
        thread::Builder::new().name("vhost-deadline".into()).spawn_scoped(scope, watch)?;
        let result = work();
        drop(done);
        Ok((result, late.load(Ordering::Acquire)))
    })
}

/// Runs `work`, which waits for pages through `waiter`, and kicks `waiter` when either side closes
/// the connection.
pub(crate) fn while_open<T>(
    connection: &HangUp,
    waiter: &Waiter,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = || {
            let wait = wait;
            while wait.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if connection.is_closed() {
                    return waiter.kick();
                }
            }
        };
        thread::Builder::new().name("vhost-hang-up".into()).spawn_scoped(scope, watch)?;
        let result = work();
        drop(done);
        Ok(result)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    fn watched(stream: &UnixStream) -> HangUp {
        HangUp::new(stream.try_clone().unwrap(), Path::new("s"))
    }

    #[test]
    fn a_wait_ends_in_time() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let watched = watched(&ours);
        let wait = || ours.read(&mut [0]).unwrap();
        let patience = Duration::from_millis(20);
        assert_eq!(within(patience, &watched, || false, wait).unwrap(), (0, true));
    }

    #[test]
    fn time_with_an_excuse_does_not_count() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let watched = watched(&ours);
        let begun = Instant::now();
        let (patience, excuse) = (Duration::from_millis(20), Duration::from_millis(400));
        let wait = || ours.read(&mut [0]).unwrap();
        let excused = || begun.elapsed() < excuse;
        assert_eq!(within(patience, &watched, excused, wait).unwrap(), (0, true));
        assert!(begun.elapsed() >= excuse, "{:?}", begun.elapsed());
    }

    #[test]
    fn quick_work_is_left_alone() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (result, late) =
            within(Duration::from_secs(60), &watched(&ours), || false, || 7).unwrap();
        assert_eq!((result, late), (7, false));
    }
}
