// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The markers of a guest's mapping, which stop a vCPU at a missing page by a signal.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use demand_memory::{Mapped, PAGE_SIZE, PageRange, Pager, to_usize};

use crate::{ArmedMapping, Cause, RangeError};

/// Number of units that get their markers at once. Setting one costs some 240 instructions, so all
/// of a large memory at its start would take seconds.
const CHUNK: u64 = 512;

/// Number of immediate retries while the layout of the address space changes.
const TRIES: u32 = 64;

/// The markers of a guest's mapping. They are set chunk by chunk: the first access to a chunk is an
/// ordinary fault, and all later ones are signals.
///
/// A marker stays until its unit is mapped. In shared memory the pager maps each page as it
/// arrives, so markers go away by themselves; a huge page that arrived by other ways than its
/// vCPU's keeps its marker until a vCPU meets it, or until the end.
#[derive(Debug)]
pub(crate) struct Markers {
    /// A bit for each chunk that has its markers.
    marked: Box<[AtomicU64]>,
    /// Whether no marker may be set any more. Read-locked while markers are set.
    over: RwLock<bool>,
}

impl Markers {
    /// Prepares the markers of a mapping of `units` units.
    pub(crate) fn new(units: u64) -> Self {
        let words = units.div_ceil(CHUNK).div_ceil(64);
        Markers { marked: (0..words).map(|_| AtomicU64::new(0)).collect(), over: RwLock::default() }
    }

    /// Returns the word and the bit of a chunk.
    fn bit(&self, chunk: u64) -> (&AtomicU64, u64) {
        (&self.marked[to_usize(chunk / 64)], 1 << (chunk % 64))
    }
}

impl ArmedMapping {
    /// Sets the markers of the chunk around a granule on which a vCPU has faulted, unless it has
    /// them. The granule itself gets none: the fault on it is served. If the kernel refuses, later
    /// faults in the chunk are ordinary ones, too.
    pub(crate) fn mark_around(&self, granule: PageRange) {
        let Some(markers) = self.markers() else { return };
        let unit = self.unit() / PAGE_SIZE;
        let chunk = granule.first / unit / CHUNK;
        let (word, bit) = markers.bit(chunk);
        if word.load(Ordering::Relaxed) & bit != 0 {
            return;
        }
        let Some(pager) = self.pager() else { return };
        let over = markers.over.read().unwrap_or_else(PoisonError::into_inner);
        if *over || word.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            return;
        }
        let first = chunk * CHUNK * unit;
        let last = (first + CHUNK * unit).min(self.pages());
        for part in [PageRange::new(first, granule.first - first), from_to(granule.end(), last)] {
            if let Err(error) = self.mark_missing(&pager, part) {
                log::debug!("cannot mark missing pages: {error}");
                word.fetch_and(!bit, Ordering::AcqRel);
            }
        }
    }

    /// Sets markers on the units of a range that have missing pages.
    fn mark_missing(&self, pager: &Pager, range: PageRange) -> Result<(), RangeError> {
        let unit = self.unit() / PAGE_SIZE;
        let mut first = range.first;
        while let Some(missing) = pager.bitmap().first_missing(from_to(first, range.end())) {
            let start = missing / unit * unit;
            let is_missing =
                |at: &u64| pager.bitmap().first_missing(PageRange::new(*at, unit)).is_some();
            let units = (start..range.end()).step_by(to_usize(unit)).take_while(is_missing);
            let run = PageRange::new(start, units.count() as u64 * unit);
            self.mark_run(pager, run)?;
            first = run.end();
        }
        Ok(())
    }

    /// Sets markers on the units of a run that were missing a moment ago.
    fn mark_run(&self, pager: &Pager, run: PageRange) -> Result<(), RangeError> {
        self.mark(run)?;
        self.map_populated(pager, run)
    }

    /// Sets markers on the units of a range that are not mapped.
    fn mark(&self, run: PageRange) -> Result<(), RangeError> {
        let (mut at, end) = (self.base() + run.offset(), self.base() + run.end() * PAGE_SIZE);
        let mut tries = 0;
        while at < end {
            let Err(error) = self.uffd().poison(at, end - at) else { break };
            at += error.done;
            match error.cause() {
                // It has arrived since.
                Cause::Exists => at += self.unit(),
                Cause::Again if tries < TRIES => tries += 1,
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Maps the pages of shared memory whose content has arrived while they were marked. The pager
    /// has mapped them already; but if the kernel reclaimed such a page before its marker was set,
    /// the marker would stay for good.
    fn map_populated(&self, pager: &Pager, run: PageRange) -> Result<(), RangeError> {
        if self.unit() != PAGE_SIZE {
            return Ok(());
        }
        let populated =
            |page: &u64| pager.bitmap().is_populated(*page) || !pager.bitmap().is_missing(*page);
        (run.first..run.end())
            .filter(populated)
            .try_for_each(|page| self.map(PageRange::page(page)).map(drop))
    }

    /// Maps a unit in place of its marker.
    pub(crate) fn map_marked(&self, unit: PageRange) -> io::Result<Mapped> {
        match self.map(unit) {
            Ok(true) => Ok(Mapped::Now),
            Ok(false) => Ok(Mapped::Before),
            Err(error) if error.source.raw_os_error() == Some(libc::EIO) => Ok(Mapped::Lost),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes all markers, and sets no more: every page is present. In shared memory none is left.
    pub(crate) fn remove_markers(&self) -> Result<(), RangeError> {
        let Some(markers) = self.markers() else { return Ok(()) };
        *markers.over.write().unwrap_or_else(PoisonError::into_inner) = true;
        if self.unit() == PAGE_SIZE {
            return Ok(());
        }
        let units = CHUNK * self.unit() / PAGE_SIZE;
        let chunks = self.pages().div_ceil(units);
        for chunk in 0..chunks {
            let (word, bit) = markers.bit(chunk);
            if word.load(Ordering::Acquire) & bit != 0 {
                self.map(from_to(chunk * units, ((chunk + 1) * units).min(self.pages())))?;
            }
        }
        Ok(())
    }
}

/// Returns the pages from `first` to before `end`, possibly none.
fn from_to(first: u64, end: u64) -> PageRange {
    PageRange::new(first, end.saturating_sub(first))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use demand_memory::{BackingKind, FaultPath, MemfdBacking, PagerConfig, VcpuTrap, Waiter};
    use demand_source::LocalFile;

    use super::*;
    use crate::{Features, Userfaultfd};

    /// The kernel may reclaim a page between the moment in which the pager maps it and the moment
    /// in which its bit is cleared. A marker that is set there must not stay.
    #[test]
    fn reclaimed_page_keeps_no_marker() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8 * PAGE_SIZE).unwrap();
        std::os::unix::fs::FileExt::write_all_at(image.as_file(), &[7], 3 * PAGE_SIZE).unwrap();
        let source = Arc::new(LocalFile::open(image.path()).unwrap());
        let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 8 * PAGE_SIZE).unwrap());
        let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
        let features = Features::GUEST_MEMORY | Features::POISON;
        let uffd = Arc::new(Userfaultfd::open(features).unwrap());
        let (armed, guest) = ArmedMapping::guest(&uffd, &pager, VcpuTrap::Markers).unwrap();
        let page = PageRange::page(3);
        pager.ensure(page, FaultPath::Fill, &Waiter::new()).unwrap();
        guest.mapping().unmap_pages().unwrap();
        armed.mark_run(&pager, page).unwrap();
        // SAFETY: the byte lies in the mapping, and no reference to it exists.
        assert_eq!(unsafe { guest.mapping().at(3 * PAGE_SIZE).as_ptr().read_volatile() }, 7);
    }
}
