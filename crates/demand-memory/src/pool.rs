// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's pools of huge pages.

use std::fs;

use crate::BackingKind;

/// The kernel's huge pages of one size, counted for the whole machine.
///
/// Source: Documentation/admin-guide/mm/hugetlbpage.rst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePagePool {
    /// Number of pages of this size, in use or not.
    pub total: u64,
    /// Number of pages that are neither used nor reserved: this many units of memory can be
    /// allocated or reserved.
    pub free: u64,
}

impl HugePagePool {
    /// Returns the pool that this kind of memory is taken from. `None` for ordinary memory, and if
    /// the processor or the kernel has no pages of this size.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{BackingKind, HugePagePool};
    ///
    /// assert_eq!(HugePagePool::of(BackingKind::Shmem), None);
    /// if let Some(pool) = HugePagePool::of(BackingKind::Hugetlb2M) {
    ///     assert!(pool.free <= pool.total);
    /// }
    /// ```
    pub fn of(kind: BackingKind) -> Option<Self> {
        if !kind.is_hugetlb() {
            return None;
        }
        let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", kind.unit() >> 10);
        let count = |name: &str| -> Option<u64> {
            fs::read_to_string(format!("{folder}/{name}")).ok()?.trim().parse().ok()
        };
        let total = count("nr_hugepages")?;
        let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
        Some(HugePagePool { total, free: free.min(total) })
    }
}
