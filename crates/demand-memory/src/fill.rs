// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background fill: fetches the pages that no accessor has asked for yet.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{FaultPath, FetchError, PAGE_SIZE, PageRange, Pager, Stats, Waiter, join_within};

mod delay;
mod flights;
mod options;
mod plan;
mod window;

use flights::{Arrivals, Flight};
pub use options::{FillOptions, FillOrder, FillRange, FillRate, InFlight};
use plan::Plan;
use window::Window;

/// Longest wait of a dropped [`Fill`] for its thread, if the source does not return from a call as
/// it should.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Interval between checks whether the awaited pages have failed one by one.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A thread that makes all pages of some regions present, with the [`FillOptions`] that it was
/// started with.
///
/// It passes over pages that the source cannot deliver, and they are retried until it can. The
/// thread ends when all pages are present, except those of regions that were stopped and those that
/// [`FillOrder::RangesOnly`] leaves out, or when this is dropped.
///
/// # Examples
///
/// ```
/// use demand_memory::{
///     BackingKind, Fill, FillOptions, FillOrder, FillRange, MemfdBacking, PageRange, Pager,
///     PagerConfig,
/// };
/// use demand_source::LocalFile;
/// use std::sync::Arc;
///
/// let image = tempfile::NamedTempFile::new().unwrap();
/// image.as_file().set_len(1 << 20).unwrap();
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
/// let source = Arc::new(LocalFile::open(image.path()).unwrap());
/// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
///
/// // The working set of an earlier run first: one page here.
/// let working_set = vec![FillRange { region: 0, pages: PageRange::page(200) }];
/// let order = FillOrder::RangesFirst(working_set);
/// let fill = Fill::start(vec![pager.clone()], FillOptions { order, ..FillOptions::default() });
/// let fill = fill.unwrap();
/// # let begun = std::time::Instant::now();
/// while !pager.bitmap().is_complete() {
/// #     assert!(begun.elapsed().as_secs() < 20);
///     std::thread::sleep(std::time::Duration::from_millis(1));
/// }
/// assert!(fill.in_flight_limit() >= FillOptions::CHUNK);
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends the fill"]
pub struct Fill {
    stop: Arc<AtomicBool>,
    arrivals: Arc<Arrivals>,
    window: Arc<AtomicU64>,
    waiter: Waiter,
    thread: Option<JoinHandle<()>>,
}

impl Fill {
    /// Starts to fill the regions of these pagers. `options` are [`FillOptions`], or a [`FillRate`]
    /// for the other defaults.
    ///
    /// # Errors
    ///
    /// The system's error if the thread cannot be started.
    pub fn start(pagers: Vec<Arc<Pager>>, options: impl Into<FillOptions>) -> io::Result<Self> {
        let options = options.into();
        let (stop, arrivals) = (Arc::new(AtomicBool::new(false)), Arc::new(Arrivals::default()));
        let window = Window::new(options.in_flight, options.chunk, Instant::now());
        let limit = Arc::new(AtomicU64::new(window.bytes()));
        let mut stats: Vec<Arc<Stats>> = Vec::new();
        for pager in &pagers {
            if !stats.iter().any(|known| Arc::ptr_eq(known, pager.stats())) {
                stats.push(pager.stats().clone());
            }
        }
        let errors = stats.iter().map(|stats| stats.errors()).sum();
        let waiter = Waiter::background();
        let filler = Filler {
            plan: Plan::new(pagers, &options),
            pace: Pace { rate: options.rate, begun: Instant::now(), bytes: 0 },
            window,
            limit: limit.clone(),
            stats,
            errors,
            flights: Vec::new(),
            stop: stop.clone(),
            arrivals: arrivals.clone(),
            waiter: waiter.clone(),
        };
        let thread = thread::Builder::new().name("fill".into()).spawn(move || {
            // Nothing is left to do after the end of either kind.
            let _ = filler.run();
        })?;
        Ok(Fill { stop, arrivals, window: limit, waiter, thread: Some(thread) })
    }

    /// Returns the largest number of bytes that it currently keeps in flight: see [`InFlight`].
    pub fn in_flight_limit(&self) -> u64 {
        self.window.load(Ordering::Relaxed)
    }
}

/// The fill was dropped.
struct Stopped;

/// The state of the fill's thread.
struct Filler {
    plan: Plan,
    pace: Pace,
    window: Window,
    /// The window's size, for other threads.
    limit: Arc<AtomicU64>,
    /// The statistics of the pagers.
    stats: Vec<Arc<Stats>>,
    /// Number of failed attempts that the window knows of.
    errors: u64,
    /// The requests whose pages have not all arrived.
    flights: Vec<Flight>,
    stop: Arc<AtomicBool>,
    arrivals: Arc<Arrivals>,
    waiter: Waiter,
}

impl Filler {
    fn run(mut self) -> Result<(), Stopped> {
        loop {
            let in_flight: u64 = self.flights.iter().map(|flight| flight.bytes).sum();
            if self.flights.is_empty()
                || in_flight.saturating_add(self.plan.chunk_bytes()) <= self.window.bytes()
            {
                if let Some((pager, pages)) = self.plan.next() {
                    self.request(&pager, pages)?;
                    continue;
                }
                if self.flights.is_empty() {
                    break;
                }
            }
            self.await_arrival()?;
        }
        if self.plan.is_partial() {
            return Ok(());
        }
        // The remaining pages were claimed by other threads, or could not be read yet.
        for pager in self.plan.pagers() {
            let all = PageRange::new(0, pager.pages());
            let outcome = pager.ensure(all, FaultPath::Fill, &self.waiter);
            if outcome == Err(FetchError::Kicked) {
                return Err(Stopped);
            }
        }
        Ok(())
    }

    fn request(&mut self, pager: &Arc<Pager>, pages: PageRange) -> Result<(), Stopped> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Stopped);
        }
        let missing = pager.bitmap().count_missing(pages) * PAGE_SIZE;
        // An error means that the region was stopped: others may remain.
        if pager.fetch(pages, FaultPath::Fill).is_err() {
            return Ok(());
        }
        self.flights.extend(self.arrivals.expect(pager, pages));
        self.pace.keep(missing, &self.stop);
        Ok(())
    }

    /// Tells the window how the source treats faults.
    fn look_at_faults(&mut self) {
        for (at, delay) in self.stats.iter().flat_map(|stats| stats.take_delays()) {
            self.window.fault_took(delay, at);
        }
        let errors = self.stats.iter().map(|stats| stats.errors()).sum();
        if std::mem::replace(&mut self.errors, errors) < errors {
            self.window.failed();
        }
    }

    /// Waits until some pages in flight have arrived.
    fn await_arrival(&mut self) -> Result<(), Stopped> {
        let arrived = self.arrivals.wait(LOOK_EVERY);
        if self.stop.load(Ordering::Relaxed) {
            return Err(Stopped);
        }
        let now = Instant::now();
        let mut landed = 0;
        self.flights.retain(|flight| {
            let has_arrived = arrived.contains(&flight.number);
            landed += if has_arrived { flight.bytes } else { 0 };
            // Pages that have failed one by one are retried again and again, and must not delay the
            // others.
            !has_arrived && !flight.is_set_aside()
        });
        self.look_at_faults();
        if landed > 0 {
            self.window.arrived(landed, now);
        }
        self.limit.store(self.window.bytes(), Ordering::Relaxed);
        Ok(())
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

impl Drop for Fill {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.arrivals.wake();
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
