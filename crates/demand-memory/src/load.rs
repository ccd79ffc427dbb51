// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Units that are created together with their content.

use std::io;

use demand_source::MappedBytes;

/// Creates whole units of a memory object together with their content.
///
/// It serves faults that want a whole unit, such as those of a back-end. Background fill uses
/// smaller steps, so that demand faults need not wait for it, and reads into zeroed pages.
///
/// A new huge page is zeroed before anything can be read into it, which is a fifth of the time that
/// fetching 2 MiB takes. If all of a unit is missing and its content is mapped in this process, the
/// zeroing can be avoided: the kernel fills the page before any process can access it. No reader
/// sees the unit half-filled, either. demand-uffd implements this trait, because it has the system
/// call for it.
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
