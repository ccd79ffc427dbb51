// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Units that are created together with their content.

use std::io;

use demand_source::MappedBytes;

/// Creates whole units of a memory object together with their content.
///
/// It serves faults that want a whole unit, such as those of a back-end. Background fill uses
/// smaller steps, so that demand faults need not wait for it, and reads into zeroed pages.
///
/// A new huge page is zeroed before anything can be read into it. If all of a unit is missing and
/// its content is mapped in this process, the zeroing can be avoided: the kernel fills the page
/// before any process can access it. No reader sees the unit half-filled, either. The time saved
/// depends on the machine: measured by the whole system's benchmark (`bench back-end --backing
/// hugetlb-2m --unit 2097152`, medians of eight runs with and without a loader, an image in
/// memory), a back-end's fault of 2 MiB takes 393 us instead of 404 us, 3 % less.
///
/// This trait is a border between crates, and has one implementor: the pager calls it, and
/// demand-uffd, which has the system call for it, implements it.
pub trait LoadUnit: Send + Sync {
    /// Creates the unit at `offset` (bytes) of the memory object with `content`, which is as long
    /// as the unit. The pager calls it with units that it has claimed as a whole.
    ///
    /// # Errors
    ///
    /// The system's error. The unit is then unchanged, and the pager populates it in the ordinary
    /// way.
    fn load(&self, offset: u64, content: MappedBytes<'_>) -> io::Result<()>;

    /// Ends loading: all pages are present, or the pager has another loader. May be called more
    /// than once.
    fn finish(&self);
}
