// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many huge pages the kernel has.

use std::fs;

use crate::BackingKind;

/// The kernel's huge pages of one size, as it counts them for all of the machine.
///
/// Source: Documentation/admin-guide/mm/hugetlbpage.rst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePagePool {
    /// Pages of this size, in use or not.
    pub total: u64,
    /// Those that nobody uses and nobody has reserved: memory of so many units can be had, with
    /// `reserve=on` as well.
    pub free: u64,
}

impl HugePagePool {
    /// The pool that this kind of memory is taken from; `None` for ordinary memory, and where the
    /// processor or the kernel has no pages of this size.
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
        if kind == BackingKind::Shmem {
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
