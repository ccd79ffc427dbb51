// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests of background fill whose pages have not arrived, and how the fill learns of them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{PAGE_SIZE, PageRange, Pager};

/// A request whose pages have not all arrived.
pub(super) struct Flight {
    pub(super) number: u64,
    pub(super) pager: Arc<Pager>,
    pages: PageRange,
    /// Bytes that were missing after the request was made.
    pub(super) bytes: u64,
}

impl Flight {
    /// Returns whether each page that has not arrived has failed when fetched by itself.
    pub(super) fn is_set_aside(&self) -> bool {
        self.pager.is_set_aside(self.pages)
    }
}

/// The numbers of the requests that have arrived. Threads of the source add to them.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    arrived: Vec<u64>,
    woken: bool,
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the request for these pages, which were fetched before, unless all have arrived.
    pub(super) fn expect(self: &Arc<Self>, pager: &Arc<Pager>, pages: PageRange) -> Option<Flight> {
        let bytes = pager.bitmap().count_missing(pages) * PAGE_SIZE;
        if bytes == 0 {
            return None;
        }
        let number = {
            let mut state = self.lock();
            state.next += 1;
            state.next
        };
        // If the memory is stopped it is dropped, and so wakes the fill, which then finds that out.
        let notice = Notice { arrivals: self.clone(), number };
        pager.bitmap().when_filled(pages, move || drop(notice));
        Some(Flight { number, pager: pager.clone(), pages, bytes })
    }

    /// Waits until a request arrives or [`wake`](Self::wake) is called, for at most `limit`.
    /// Returns the requests that have arrived since the last call.
    pub(super) fn wait(&self, limit: Duration) -> Vec<u64> {
        let mut state = self.lock();
        if state.arrived.is_empty() && !state.woken {
            let wait = self.changed.wait_timeout(state, limit);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::take(&mut state.arrived)
    }

    /// Ends all waits, current and future.
    pub(super) fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }
}

/// A request that has not arrived. Its drop reports the arrival.
struct Notice {
    arrivals: Arc<Arrivals>,
    number: u64,
}

impl Drop for Notice {
    fn drop(&mut self) {
        self.arrivals.lock().arrived.push(self.number);
        self.arrivals.changed.notify_all();
    }
}
