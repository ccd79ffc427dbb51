// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of a host cache.

use std::sync::atomic::{AtomicU64, Ordering};

/// The use that this process has made of a host cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads that the cache answered.
    pub hits: u64,
    /// Bytes of these reads.
    pub hit_bytes: u64,
    /// Chunks that came from the store.
    pub misses: u64,
    /// Bytes that were written to the cache.
    pub written_bytes: u64,
    /// Chunks that came from the store although another process had claimed them, because it did
    /// not deliver them in time.
    pub overdue: u64,
    /// Packs that were removed to keep to the size.
    pub evicted: u64,
}

/// The counters behind [`CacheStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    hits: AtomicU64,
    hit_bytes: AtomicU64,
    misses: AtomicU64,
    written_bytes: AtomicU64,
    overdue: AtomicU64,
    evicted: AtomicU64,
}

impl Counters {
    pub(crate) fn hit(&self, bytes: usize) {
        self.hits.fetch_add(1, Ordering::Relaxed);
        self.hit_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn miss(&self, overdue: bool) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.overdue.fetch_add(overdue.into(), Ordering::Relaxed);
    }

    pub(crate) fn wrote(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn evicted(&self, packs: u64) {
        self.evicted.fetch_add(packs, Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        CacheStats {
            hits: read(&self.hits),
            hit_bytes: read(&self.hit_bytes),
            misses: read(&self.misses),
            written_bytes: read(&self.written_bytes),
            overdue: read(&self.overdue),
            evicted: read(&self.evicted),
        }
    }
}
