// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Units that come into being with their content.

use std::io;

use demand_source::MappedBytes;

/// Creates whole units of a memory object together with their content.
///
/// It is for faults that want a whole unit, a back-end's for one. Background fill goes in smaller
/// steps, so that demand need not wait for it, and reads into zeroed pages.
///
/// A new huge page is zeroed before anything can be read into it, which is a fifth of the time
/// that 2 MiB take. Where all of a unit is missing and its content is mapped in this process, that
/// can be spared: the kernel fills the page before anybody has it (`UFFDIO_COPY`). Nobody sees the
/// unit half-filled, either. The userfaultfd side implements this, as it has the means.
pub trait LoadUnit: Send + Sync {
    /// Creates the unit at `offset` (bytes) of the memory object with `content`, as long as the
    /// unit is. The pager calls it with units that it has claimed as a whole.
    ///
    /// # Errors
    ///
    /// The system's. The unit is then as it was, and the pager fills it in the ordinary way.
    fn load(&self, offset: u64, content: MappedBytes<'_>) -> io::Result<()>;

    /// Nothing is loaded from now on: all pages are present, or there is another loader. It may be
    /// called more than once.
    fn finish(&self);
}
