// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue of work that is due later, with a descriptor that wakes the threads that do it.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::hash::Hash;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// Items that are due later, each with a key of which at most one item waits.
///
/// Its [descriptor](AsRawFd) becomes readable when an item is due. Any thread may then
/// [take](Self::take_due) it, because the thread that deferred it may be blocked by then.
pub(crate) struct DeferredQueue<K, T> {
    fd: RawFd,
    inner: Mutex<Inner<K, T>>,
}

struct Inner<K, T> {
    /// Expires when the first item is due. The lock keeps two threads from setting it in the wrong
    /// order.
    timer: TimerFd,
    /// Keys by due time. The number keeps the order of items that are due at the same time.
    order: BinaryHeap<Reverse<(Instant, u64, K)>>,
    items: HashMap<K, T>,
    next: u64,
    closed: bool,
}

impl<K: Copy + Ord + Hash, T> DeferredQueue<K, T> {
    pub(crate) fn new() -> io::Result<Self> {
        let timer = TimerFd::new()?;
        let (order, items) = (BinaryHeap::new(), HashMap::new());
        let fd = timer.as_raw_fd();
        let inner = Inner { timer, order, items, next: 0, closed: false };
        Ok(DeferredQueue { fd, inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Defers an item until `due`. If one with the same key waits already, drops the new item: the
    /// earlier one does its work. Returns the item if the queue was closed.
    pub(crate) fn defer(&self, key: K, item: T, due: Instant) -> Result<(), T> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(item);
        }
        if let Entry::Vacant(place) = inner.items.entry(key) {
            place.insert(item);
            let number = inner.next;
            inner.next += 1;
            inner.order.push(Reverse((due, number, key)));
            inner.set_timer();
        }
        Ok(())
    }

    /// Takes the items that are due at `now`, in the order of their due times.
    pub(crate) fn take_due(&self, now: Instant) -> Vec<T> {
        let mut inner = self.lock();
        let mut taken = Vec::new();
        while let Some(Reverse((due, _, key))) = inner.order.peek().copied()
            && due <= now
        {
            inner.order.pop();
            taken.extend(inner.items.remove(&key));
        }
        inner.set_timer();
        taken
    }

    /// Drops the items for which `unwanted` returns true: outside the lock, because an item may own
    /// a descriptor whose close waits for another process.
    pub(crate) fn remove(&self, mut unwanted: impl FnMut(&T) -> bool) {
        let mut inner = self.lock();
        let Inner { order, items, .. } = &mut *inner;
        let removed: Vec<T> =
            items.extract_if(|_, item| unwanted(item)).map(|(_, item)| item).collect();
        order.retain(|Reverse((_, _, key))| items.contains_key(key));
        drop(inner);
        drop(removed);
    }

    /// Drops all items, outside the lock like [`remove`](Self::remove), and accepts no more.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.order.clear();
        let items = std::mem::take(&mut inner.items);
        drop(inner);
        drop(items);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

impl<K: Copy + Ord, T> Inner<K, T> {
    /// Sets the timer for the item that is due next.
    fn set_timer(&mut self) {
        let set = match self.order.peek() {
            Some(Reverse((due, ..))) => {
                // Zero would disarm the timer.
                let left = due.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_micros(1)), None)
            }
            // A disarmed timer is not readable. Reading it would have the same effect, but could
            // block.
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            log::error!("cannot set a timer: {error}; a fault may stay unresolved");
        }
    }
}

impl<K, T> AsRawFd for DeferredQueue<K, T> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn is_readable(queue: &DeferredQueue<u64, &str>, within: Duration) -> bool {
        let mut poll = libc::pollfd { fd: queue.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let within = within.as_millis().try_into().expect("a short time");
        // SAFETY: one entry, as the count says.
        unsafe { libc::poll(&mut poll, 1, within) == 1 }
    }

    #[test]
    fn items_are_taken_in_order_of_due_times() {
        let (queue, now) = (DeferredQueue::new().unwrap(), Instant::now());
        for (key, item, ms) in [(1, "third", 7), (2, "first", 2), (3, "last", 9), (4, "second", 2)]
        {
            queue.defer(key, item, now + ms * MS).unwrap();
        }
        assert_eq!(queue.take_due(now + MS), [""; 0]);
        assert_eq!(queue.take_due(now + 8 * MS), ["first", "second", "third"]);
        assert_eq!(queue.take_due(now + 8 * MS), [""; 0]);
        assert_eq!(queue.take_due(now + 9 * MS), ["last"]);
    }

    #[test]
    fn one_item_of_a_key_waits() {
        let (queue, now) = (DeferredQueue::new().unwrap(), Instant::now());
        queue.defer(1, "first", now + 5 * MS).unwrap();
        queue.defer(1, "dropped", now).unwrap();
        assert_eq!(queue.take_due(now), [""; 0]);
        assert_eq!(queue.take_due(now + 5 * MS), ["first"]);
        queue.defer(1, "second", now).unwrap();
        assert_eq!(queue.take_due(now), ["second"]);
    }

    #[test]
    fn removed_items_are_not_taken() {
        let (queue, now) = (DeferredQueue::new().unwrap(), Instant::now());
        queue.defer(1, "removed", now).unwrap();
        queue.defer(2, "kept", now).unwrap();
        queue.remove(|item| *item == "removed");
        queue.defer(1, "again", now + MS).unwrap();
        assert_eq!(queue.take_due(now), ["kept"]);
        assert_eq!(queue.take_due(now + MS), ["again"]);
    }

    #[test]
    fn closed_queue_returns_the_item() {
        let (queue, now) = (DeferredQueue::new().unwrap(), Instant::now());
        queue.defer(1, "dropped", now).unwrap();
        queue.close();
        assert_eq!(queue.defer(2, "returned", now), Err("returned"));
        assert_eq!(queue.take_due(now), [""; 0]);
    }

    #[test]
    fn descriptor_is_readable_when_an_item_is_due() {
        let (queue, now) = (DeferredQueue::new().unwrap(), Instant::now());
        queue.defer(1, "late", now + 3600 * 1000 * MS).unwrap();
        assert!(!is_readable(&queue, Duration::ZERO));
        queue.defer(2, "soon", now + 20 * MS).unwrap();
        assert!(is_readable(&queue, Duration::from_secs(20)));
        assert!(now.elapsed() >= 20 * MS);
        assert_eq!(queue.take_due(Instant::now()), ["soon"]);
        // Until the next one is due.
        assert!(!is_readable(&queue, Duration::ZERO));
    }
}
