// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits of the requests in progress: one for demand, one for background fill.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use demand_source::Priority;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Numbers of requests that may be in progress at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of demand. Guests rarely have more threads that wait.
    pub(crate) demand: usize,
    /// Of background fill.
    pub(crate) fill: usize,
}

/// The requests that wait for their turn. Demand waits for demand only. Fill that a thread has
/// begun to wait for becomes demand.
#[derive(Debug)]
pub(crate) struct Queue {
    demand: Arc<Semaphore>,
    fill: Arc<Semaphore>,
    waiting: Mutex<Vec<Weak<Waiting>>>,
}

/// A fill request that waits for its turn.
#[derive(Debug)]
struct Waiting {
    offset: u64,
    end: u64,
    wanted: Notify,
}

/// The right to have one request in progress.
#[derive(Debug)]
pub(crate) struct Turn {
    /// The priority that the request has now.
    pub(crate) priority: Priority,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Queue {
            demand: Arc::new(Semaphore::new(limits.demand)),
            fill: Arc::new(Semaphore::new(limits.fill)),
            waiting: Mutex::default(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Weak<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn of a request for `len` bytes at `offset`.
    pub(crate) async fn turn(&self, priority: Priority, offset: u64, len: u64) -> Turn {
        if priority == Priority::Demand {
            return self.demand_turn().await;
        }
        let waiting = Arc::new(Waiting { offset, end: offset + len, wanted: Notify::new() });
        {
            let mut all = self.waiting();
            all.retain(|one| one.strong_count() > 0);
            all.push(Arc::downgrade(&waiting));
        }
        tokio::select! {
            // A request that is wanted needs no turn of fill.
            biased;
            () = waiting.wanted.notified() => self.demand_turn().await,
            // The semaphore is never closed.
            permit = self.fill.clone().acquire_owned() => {
                Turn { priority, _permit: permit.ok() }
            }
        }
    }

    async fn demand_turn(&self) -> Turn {
        let permit = self.demand.clone().acquire_owned().await;
        Turn { priority: Priority::Demand, _permit: permit.ok() }
    }

    /// Gives the waiting fill requests that touch these `len` bytes the priority of demand.
    pub(crate) fn raise(&self, offset: u64, len: u64) {
        let end = offset + len;
        for one in self.waiting().iter().filter_map(Weak::upgrade) {
            if one.offset < end && offset < one.end {
                one.wanted.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    #[test]
    fn raised_fill_overtakes_queued_fill() {
        let queue = Arc::new(Queue::new(Limits { demand: 1, fill: 1 }));
        runtime::wait(async {
            let first = queue.turn(Priority::Fill, 0, 10).await;
            let queued = |offset| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.turn(Priority::Fill, offset, 10).await })
            };
            let (other, wanted) = (queued(10), queued(20));
            while queue.waiting().iter().filter(|one| one.strong_count() > 0).count() < 2 {
                tokio::task::yield_now().await;
            }
            queue.raise(29, 1);
            let turn = wanted.await.unwrap();
            assert_eq!(turn.priority, Priority::Demand);
            assert!(!other.is_finished());
            drop(first);
            assert_eq!(other.await.unwrap().priority, Priority::Fill);
        });
    }

    #[test]
    fn demand_does_not_wait_for_fill() {
        let queue = Queue::new(Limits { demand: 1, fill: 1 });
        runtime::wait(async {
            let _fill = queue.turn(Priority::Fill, 0, 10).await;
            assert_eq!(queue.turn(Priority::Demand, 0, 10).await.priority, Priority::Demand);
        });
    }
}
