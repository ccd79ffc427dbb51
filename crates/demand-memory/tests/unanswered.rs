// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages that the source leaves unanswered are reported by the retrier itself.
#![cfg(not(loom))]

use std::fs;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, FetchError, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig,
    Retrier, RetryPolicy, Waiter,
};
use demand_source::{Completion, Extent, PageSource, Request, SourceError};
use test_support::image::far;
use test_support::wait::{PATIENCE, until};

const PAGES: u64 = 64;

/// One test at a time looks for threads.
static ONE: Mutex<()> = Mutex::new(());

fn pager(source: Arc<dyn PageSource>, retrier: Retrier) -> Arc<Pager> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap());
    Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing, source) }).unwrap()
}

fn looks() -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread may end meanwhile.
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.into_iter().any(|name| name.trim() == "waits")
}

#[test]
fn hanging_page_is_reported_once() {
    let _one = ONE.lock().unwrap();
    let (source, control) = far(PAGES * PAGE_SIZE);
    let (sender, reports) = channel();
    let retrier = Retrier::new(RetryPolicy::default(), move |failure| {
        sender.send((failure.attempts, failure.image_offset, failure.to_string())).unwrap();
    });
    let pager = pager(Arc::new(source), retrier.clone());
    assert!(!looks(), "nothing was requested");
    control.hold([9]);
    let _guard = control.release_at_the_end();
    let reader = thread::spawn({
        let pager = pager.clone();
        move || pager.ensure(PageRange::page(9), FaultPath::Guest, &Waiter::new())
    });
    let (attempts, offset, text) = reports.recv_timeout(PATIENCE).unwrap();
    assert_eq!((attempts, offset), (0, 9 * PAGE_SIZE));
    assert!(text.contains("no answer for 1") && text.ends_with("; a thread waits)"), "{text}");
    let again = reports.recv_timeout(Duration::from_secs(3));
    assert_eq!(again, Err(RecvTimeoutError::Timeout));
    assert!(retrier.is_failing());
    control.release();
    reader.join().unwrap().unwrap();
    assert!(looks(), "pages are missing");
    pager.ensure(PageRange::new(0, PAGES), FaultPath::Guest, &Waiter::new()).unwrap();
    until("its thread ends with the last page", || !looks());
    assert!(!retrier.is_failing());
}

/// A source that loses every request: with a completer or a destination of it, that is a leak.
struct Leaks;

impl PageSource for Leaks {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        std::mem::forget((completer, request));
        completion
    }
}

#[test]
fn leaked_request_is_given_up_at_the_limit() {
    let _one = ONE.lock().unwrap();
    let (sender, reports) = channel();
    let policy = RetryPolicy { limit: Some(Duration::from_secs(2)), ..RetryPolicy::default() };
    let retrier = Retrier::new(policy, move |failure| {
        sender.send((failure.attempts, failure.given_up)).unwrap();
    });
    let pager = pager(Arc::new(Leaks), retrier);
    let reader = thread::spawn({
        let pager = pager.clone();
        move || pager.ensure(PageRange::page(9), FaultPath::Guest, &Waiter::new())
    });
    assert_eq!(reports.recv_timeout(PATIENCE), Ok((0, true)));
    pager.stop();
    assert_eq!(reader.join().unwrap(), Err(FetchError::Stopped));
    until("its thread ends with the memory", || !looks());
}

/// A look also finds pages whose source is only about to answer.
#[test]
fn page_under_way_is_not_given_up() {
    let _one = ONE.lock().unwrap();
    let given_up = || {
        let (source, control) = far(PAGES * PAGE_SIZE);
        let (sender, reports) = channel();
        let policy = RetryPolicy { limit: Some(Duration::ZERO), ..RetryPolicy::default() };
        let retrier = Retrier::new(policy, move |failure| sender.send(failure.given_up).unwrap());
        let pager = pager(Arc::new(source), retrier);
        control.hold([9]);
        let _guard = control.release_at_the_end();
        let begun = Instant::now();
        let reader = thread::spawn({
            let pager = pager.clone();
            move || pager.ensure(PageRange::page(9), FaultPath::Guest, &Waiter::new())
        });
        // The first look comes after a second, and the next one a second later.
        thread::sleep(Duration::from_millis(1200));
        control.release();
        reader.join().unwrap().unwrap();
        let in_time = begun.elapsed() < Duration::from_millis(1900);
        pager.stop();
        until("its thread ends with the memory", || !looks());
        in_time.then(|| reports.try_iter().count())
    };
    // A busy machine may delay one attempt, but not each of several.
    assert_eq!((0..8).find_map(|_| given_up()), Some(0));
}
