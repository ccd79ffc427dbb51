// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Claiming, publishing and waiting in every interleaving, explored by loom.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p demand-memory --test loom`.
#![cfg(loom)]

use demand_memory::{Claimed, MissingBitmap, PageRange, Published, Wait, Waiter};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

/// A page whose content loom watches: a read that is not ordered after the write is an error.
struct Page(UnsafeCell<u64>);

// SAFETY: loom checks that all accesses are ordered.
unsafe impl Sync for Page {}

impl Page {
    fn populate(&self) {
        // SAFETY: loom reports any concurrent access to the cell.
        self.0.with_mut(|content| unsafe { *content += 1 });
    }

    /// Returns how often the page was populated.
    fn read(&self) -> u64 {
        // SAFETY: loom reports any concurrent write to the cell.
        self.0.with(|content| unsafe { *content })
    }
}

struct Memory {
    bitmap: MissingBitmap,
    pages: Vec<Page>,
}

impl Memory {
    fn new(pages: u64) -> Arc<Self> {
        Arc::new(Memory {
            bitmap: MissingBitmap::new(pages).unwrap(),
            pages: (0..pages).map(|_| Page(UnsafeCell::new(0))).collect(),
        })
    }

    /// Serves a fault as a pager does. Returns how often a publication was the last.
    fn fetch(&self, range: PageRange) -> usize {
        let mut last = 0;
        let claimed = match range.count {
            1 if self.bitmap.claim_page(range.first) => Claimed::from_slice(&[range]),
            1 => Claimed::new(),
            _ => self.bitmap.claim(range),
        };
        for run in claimed {
            for page in run.first..run.end() {
                self.pages[page as usize].populate();
            }
            last += usize::from(self.bitmap.publish(run) == Published::Last);
        }
        last
    }

    fn check(&self, range: PageRange) {
        for page in range.first..range.end() {
            assert_eq!(self.pages[page as usize].read(), 1, "page {page} is populated once");
        }
    }
}

#[test]
fn two_faulters_populate_once_and_see_the_page() {
    loom::model(|| {
        let memory = Memory::new(1);
        let fault = |memory: &Memory| {
            memory.fetch(PageRange::page(0));
            assert_eq!(memory.bitmap.wait(PageRange::page(0), &Waiter::new()), Wait::Present);
            memory.check(PageRange::page(0));
        };
        let other = {
            let memory = memory.clone();
            thread::spawn(move || fault(&memory))
        };
        fault(&memory);
        other.join().unwrap();
    });
}

#[test]
fn a_unit_and_one_of_its_pages_meet() {
    loom::model(|| {
        let memory = Memory::new(3);
        let unit = PageRange::new(0, 3);
        let other = {
            let memory = memory.clone();
            thread::spawn(move || {
                memory.fetch(PageRange::page(1));
            })
        };
        memory.fetch(unit);
        assert_eq!(memory.bitmap.wait(unit, &Waiter::new()), Wait::Present);
        memory.check(unit);
        other.join().unwrap();
    });
}

#[test]
fn bitmap_reader_never_sees_page_before_its_content() {
    loom::model(|| {
        let memory = Memory::new(1);
        let vcpu = {
            let memory = memory.clone();
            thread::spawn(move || {
                // A vCPU that finds the bit cleared accesses the page without further
                // synchronization.
                if !memory.bitmap.is_missing(0) {
                    memory.check(PageRange::page(0));
                }
            })
        };
        memory.fetch(PageRange::page(0));
        vcpu.join().unwrap();
    });
}

#[test]
fn copy_misses_no_write_before_publication() {
    loom::model(|| {
        let memory = Memory::new(1);
        let mapped = Arc::new(AtomicUsize::new(0));
        let pager = {
            let (memory, mapped) = (memory.clone(), mapped.clone());
            thread::spawn(move || {
                let page = PageRange::page(0);
                assert!(memory.bitmap.claim_page(0));
                memory.pages[0].populate();
                memory.bitmap.mark_populated(page);
                // From here on the guest can access the page.
                mapped.store(1, Ordering::Release);
                memory.bitmap.publish(page);
            })
        };
        let wrote = mapped.load(Ordering::Acquire) == 1;
        if wrote {
            memory.pages[0].populate();
        }
        // The guest is paused, and memory is copied.
        match memory.bitmap.is_populated(0) {
            true => assert_eq!(memory.pages[0].read(), 1 + u64::from(wrote)),
            false => assert!(!wrote, "the source has not what the guest wrote"),
        }
        pager.join().unwrap();
    });
}

#[test]
fn completion_is_reported_once_after_all_content() {
    loom::model(|| {
        // Two words, so that two counters must agree.
        let memory = Memory::new(65);
        for run in memory.bitmap.claim(PageRange::new(0, 63)) {
            memory.bitmap.publish(run);
        }
        let told = Arc::new(AtomicUsize::new(0));
        let fault = |memory: &Memory, told: &AtomicUsize, page| {
            if memory.fetch(PageRange::page(page)) == 1 {
                told.fetch_add(1, Ordering::Relaxed);
                memory.check(PageRange::new(63, 2));
            }
        };
        let other = {
            let (memory, told) = (memory.clone(), told.clone());
            thread::spawn(move || fault(&memory, &told, 63))
        };
        fault(&memory, &told, 64);
        other.join().unwrap();
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert!(memory.bitmap.is_complete());
    });
}

#[test]
fn unit_callback_runs_once_when_unit_is_present() {
    loom::model(|| {
        let memory = Memory::new(2);
        let unit = PageRange::new(0, 2);
        let called = Arc::new(AtomicUsize::new(0));
        let other = {
            let memory = memory.clone();
            thread::spawn(move || {
                memory.fetch(PageRange::page(1));
            })
        };
        {
            let (in_callback, called) = (memory.clone(), called.clone());
            memory.bitmap.when_present(unit, move || {
                in_callback.check(unit);
                called.fetch_add(1, Ordering::Relaxed);
            });
        }
        memory.fetch(PageRange::page(0));
        other.join().unwrap();
        assert_eq!(called.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn kick_ends_one_wait_and_not_the_next() {
    loom::model(|| {
        let memory = Memory::new(1);
        let waiter = Waiter::new();
        assert_eq!(memory.bitmap.claim(PageRange::page(0)).len(), 1);
        let vcpu = {
            let (memory, waiter) = (memory.clone(), waiter.clone());
            thread::spawn(move || {
                if memory.bitmap.wait(PageRange::page(0), &waiter) == Wait::Kicked {
                    waiter.clear_kick();
                    assert_eq!(memory.bitmap.wait(PageRange::page(0), &waiter), Wait::Present);
                }
                memory.check(PageRange::page(0));
            })
        };
        waiter.kick();
        memory.pages[0].populate();
        memory.bitmap.publish(PageRange::page(0));
        vcpu.join().unwrap();
    });
}

#[test]
fn swept_page_is_not_claimed_meanwhile() {
    loom::model(|| {
        let memory = Memory::new(2);
        let faulter = {
            let memory = memory.clone();
            thread::spawn(move || memory.fetch(PageRange::page(1)))
        };
        let others = memory.bitmap.sweep(PageRange::new(0, 2), 1, |run| {
            for page in run.first..run.end() {
                // SAFETY: loom reports any concurrent access to the cell, whose content is removed.
                memory.pages[page as usize].0.with_mut(|content| unsafe { *content = 0 });
            }
            Ok::<_, ()>(())
        });
        assert!(others.unwrap().iter().all(|run| *run == PageRange::page(1)));
        faulter.join().unwrap();
        memory.fetch(PageRange::page(0));
        memory.check(PageRange::new(0, 2));
    });
}

#[test]
fn stopping_ends_every_wait() {
    loom::model(|| {
        let memory = Memory::new(1);
        memory.bitmap.claim(PageRange::page(0));
        let vcpu = {
            let memory = memory.clone();
            thread::spawn(move || memory.bitmap.wait(PageRange::page(0), &Waiter::new()))
        };
        memory.bitmap.stop();
        assert_eq!(vcpu.join().unwrap(), Wait::Stopped);
    });
}
