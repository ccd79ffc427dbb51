// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of the requests served, in memory that the daemon shares with the processes that serve
//! front-ends.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::error::Result;
use crate::options::MAX_QUEUES;
use crate::shared::{Shareable, Shared};

/// Defines the counters of a queue and the fields of their sum from one list.
macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// One queue's counters, on separate cache lines.
        #[derive(Debug, Default)]
        #[repr(C, align(128))]
        pub(crate) struct QueueCounters {
            $($(#[doc = $doc])+ pub(crate) $name: AtomicU64,)+
            /// The maximum number of requests in flight at once.
            pub(crate) most_in_hand: AtomicU64,
        }

        /// The values of [`Counters`] at one moment.
        #[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
        pub struct Snapshot {
            /// Front-ends that connected.
            pub connections: u64,
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// Chains taken but not yet answered: those in flight, and those abandoned when their
            /// front-end disconnected while they waited for memory.
            pub abandoned: u64,
            /// The maximum number of requests of one queue in flight at once.
            pub most_in_hand: u64,
            /// The main counters of each queue.
            pub queues: Vec<QueueSnapshot>,
        }

        impl Snapshot {
            fn add(&mut self, queue: &QueueCounters) {
                $(self.$name += queue.$name.load(Ordering::Relaxed);)+
            }
        }
    };
}

/// The values of one queue's main counters at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct QueueSnapshot {
    /// Chains taken, whatever their outcome.
    pub requests: u64,
    /// Bytes read from the disk by successful requests.
    pub bytes_read: u64,
    /// Bytes written to the disk by successful requests.
    pub bytes_written: u64,
    /// Requests answered with an I/O error.
    pub io_errors: u64,
    /// Page faults in which requests waited for guest memory.
    pub faults_waited: u64,
}

impl QueueCounters {
    fn snapshot(&self) -> QueueSnapshot {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueSnapshot {
            requests: of(&self.requests),
            bytes_read: of(&self.bytes_read),
            bytes_written: of(&self.bytes_written),
            io_errors: of(&self.io_errors),
            faults_waited: of(&self.faults_waited),
        }
    }
}

counters! {
    /// Chains taken from the queues, whatever their outcome.
    requests,
    /// Read requests answered with success.
    reads,
    /// Write requests answered with success.
    writes,
    /// Flush requests answered with success.
    flushes,
    /// Discard requests answered with success.
    discards,
    /// Write zeroes requests answered with success.
    write_zeroes,
    /// Requests for the serial number answered with success.
    get_ids,
    /// Requests answered as unsupported.
    unsupported,
    /// Requests answered with an I/O error, including malformed ones of unknown type.
    io_errors,
    /// Read requests answered with an I/O error.
    read_errors,
    /// Write requests answered with an I/O error.
    write_errors,
    /// Flush requests answered with an I/O error.
    flush_errors,
    /// Discard requests answered with an I/O error.
    discard_errors,
    /// Write zeroes requests answered with an I/O error.
    write_zeroes_errors,
    /// Chains without a status byte, returned with a length of 0.
    dropped,
    /// Times that written data was put on stable storage, for flushes and for writes.
    syncs,
    /// Bytes read from the disk by successful requests.
    bytes_read,
    /// Bytes written to the disk by successful requests.
    bytes_written,
    /// Bytes in the ranges of successful discard requests.
    bytes_discarded,
    /// Bytes in the ranges of successful write zeroes requests.
    bytes_zeroed,
    /// Page faults in which requests waited for guest memory, with post-copy.
    faults_waited,
}

#[derive(Debug)]
#[repr(C)]
struct AllCounters {
    connections: AtomicU64,
    queues: [QueueCounters; MAX_QUEUES as usize],
}

// SAFETY: it consists only of atomic integers, for which all zero bytes are a value.
unsafe impl Shareable for AllCounters {}

/// The counters of a device. A process forked after [`Counters::new`] counts in the same memory.
#[derive(Debug)]
pub struct Counters {
    all: Shared<AllCounters>,
    num_queues: usize,
}

impl Counters {
    /// Creates counters for `num_queues` queues, all zero.
    ///
    /// # Errors
    /// [`Error::System`](crate::Error::System) if the host cannot provide shared memory.
    ///
    /// # Panics
    /// If `num_queues` exceeds [`MAX_QUEUES`].
    pub fn new(num_queues: u16) -> Result<Self> {
        assert!(num_queues <= MAX_QUEUES);
        let all = Shared::zeroed("map memory for the counters")?;
        Ok(Counters { all, num_queues: usize::from(num_queues) })
    }

    /// Returns the counters of queue `index`.
    ///
    /// # Panics
    /// If the device has no queue `index`.
    pub(crate) fn queue(&self, index: usize) -> &QueueCounters {
        &self.all.queues[..self.num_queues][index]
    }

    /// Counts one connected front-end.
    pub(crate) fn connected(&self) {
        self.all.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the current values.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot {
            connections: self.all.connections.load(Ordering::Relaxed),
            ..Snapshot::default()
        };
        for queue in &self.all.queues[..self.num_queues] {
            sum.add(queue);
            sum.queues.push(queue.snapshot());
            sum.most_in_hand = sum.most_in_hand.max(queue.most_in_hand.load(Ordering::Relaxed));
        }
        let outcomes = [
            sum.reads,
            sum.writes,
            sum.flushes,
            sum.discards,
            sum.write_zeroes,
            sum.get_ids,
            sum.unsupported,
            sum.io_errors,
            sum.dropped,
        ];
        sum.abandoned = sum.requests.saturating_sub(outcomes.iter().sum());
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_summed() {
        let counters = Counters::new(2).unwrap();
        counters.connected();
        counters.queue(0).requests.fetch_add(3, Ordering::Relaxed);
        counters.queue(0).reads.fetch_add(2, Ordering::Relaxed);
        counters.queue(0).most_in_hand.fetch_max(2, Ordering::Relaxed);
        counters.queue(1).requests.fetch_add(1, Ordering::Relaxed);
        counters.queue(1).dropped.fetch_add(1, Ordering::Relaxed);
        counters.queue(1).bytes_written.fetch_add(512, Ordering::Relaxed);
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.connections, 1);
        assert_eq!((snapshot.requests, snapshot.abandoned), (4, 1));
        let requests: Vec<_> = snapshot.queues.iter().map(|queue| queue.requests).collect();
        assert_eq!(requests, [3, 1]);
        assert_eq!(snapshot.queues[1].bytes_written, 512);
        assert_eq!(snapshot.most_in_hand, 2);
        assert_eq!(snapshot.bytes_written, 512);
    }
}
