// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background fill: fetches the pages that no accessor has asked for yet.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{FetchError, PageRange, Pager, Path, Wait, Waiter, join_within};

/// Pages per step: 256 KiB, so that a demand fault never waits long behind one.
const CHUNK: u64 = 64;

/// Longest wait of a dropped [`Fill`] for its thread, if the source does not return from a call as
/// it should.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Interval between checks whether the awaited pages have failed one by one.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The rate of background fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillRate {
    /// The rate of the source.
    Unlimited,
    /// At most this many bytes per second on average.
    BytesPerSecond(u64),
}

/// A thread that makes all pages of some regions present, in ascending order.
///
/// It passes over pages that the source cannot deliver, and they are retried until it can. The
/// thread ends when all pages are present, when the memory is stopped, or when this is dropped.
#[derive(Debug)]
pub struct Fill {
    stop: Arc<AtomicBool>,
    waiter: Arc<Waiter>,
    thread: Option<JoinHandle<()>>,
}

impl Fill {
    /// Starts to fill the regions of these pagers, one after the other.
    ///
    /// # Errors
    ///
    /// The system's error if the thread cannot be started.
    pub fn start(pagers: Vec<Arc<Pager>>, rate: FillRate) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let waiter = Waiter::background();
        let thread = {
            let (stop, waiter) = (stop.clone(), waiter.clone());
            thread::Builder::new().name("fill".into()).spawn(move || {
                let mut pace = Pace { rate, begun: Instant::now(), bytes: 0 };
                for pager in &pagers {
                    if fill(pager, &waiter, &stop, &mut pace).is_err() {
                        return;
                    }
                }
            })?
        };
        Ok(Fill { stop, waiter, thread: Some(thread) })
    }
}

struct Pace {
    rate: FillRate,
    begun: Instant,
    bytes: u64,
}

impl Pace {
    /// Sleeps for as long as the bytes fetched so far are ahead of the rate.
    fn keep(&mut self, bytes: u64, stop: &AtomicBool) {
        self.bytes += bytes;
        let FillRate::BytesPerSecond(rate) = self.rate else { return };
        let due = Duration::from_secs_f64(self.bytes as f64 / rate.max(1) as f64);
        while !stop.load(Ordering::Relaxed) {
            let ahead = due.saturating_sub(self.begun.elapsed());
            if ahead.is_zero() {
                return;
            }
            thread::sleep(ahead.min(Duration::from_millis(50)));
        }
    }
}

fn fill(
    pager: &Arc<Pager>,
    waiter: &Arc<Waiter>,
    stop: &AtomicBool,
    pace: &mut Pace,
) -> Result<(), FetchError> {
    let pages = pager.pages();
    let mut next = 0;
    // The previous chunk: the source works on it while the next is looked up.
    let mut before = PageRange::new(0, 0);
    while let Some(first) = pager.bitmap().first_missing(PageRange::new(next, pages - next)) {
        if stop.load(Ordering::Relaxed) {
            return Err(FetchError::Stopped);
        }
        let end = (first / CHUNK + 1) * CHUNK;
        let chunk = PageRange::new(first, end.min(pages) - first);
        let missing = pager.bitmap().count_missing(chunk) * crate::PAGE_SIZE;
        pager.fetch(chunk, Path::Fill)?;
        settle(pager, before, waiter)?;
        pace.keep(missing, stop);
        (next, before) = (chunk.end(), chunk);
    }
    pager.ensure(PageRange::new(0, pages), Path::Fill, waiter)
}

/// Waits until the pages are present, or until all missing ones have failed one by one: these are
/// retried again and again, and must not delay the others.
fn settle(pager: &Pager, pages: PageRange, waiter: &Arc<Waiter>) -> Result<(), FetchError> {
    while !pager.is_set_aside(pages) {
        match pager.bitmap().wait_within(pages, waiter, LOOK_EVERY) {
            Some(Wait::Present) => return Ok(()),
            Some(Wait::Kicked) => return Err(FetchError::Kicked),
            Some(Wait::Stopped) => return Err(FetchError::Stopped),
            None => {}
        }
    }
    Ok(())
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.waiter.kick();
        let hanging = join_within(self.thread.take().into_iter().collect(), END_WITHIN);
        if hanging > 0 {
            log::warn!(
                "cannot end background fill: a call of its source does not return; its thread \
                 remains until the call returns, or until the process ends"
            );
        }
    }
}
