// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies guest memory to an image, while pages may be missing.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use demand_source::{
    Chunk, Destination, ImageWriter, ImageWriterError, PageCounts, PageSource, Priority, Request,
    Retry, SourceError, to_usize,
};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use crate::extents::{data_bytes, extent_now, extent_of, pages_of};
use crate::{DemandMemory, DemandRegion, PAGE_SIZE, PageRange, Pager};

/// Pages copied at once: 1 MiB.
const CHUNK: u64 = 256;
/// Pauses after each failed attempt of a source but the last.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];
/// Interval between calls of the progress callback while a source is slow.
const WATCH: Duration = Duration::from_millis(200);
/// Longest wait for a huge page that is being created with its content.
const PATIENCE: Duration = Duration::from_secs(2);
/// Interval between checks for the end of that creation.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The progress of [`DemandMemory::write_image`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageProgress {
    /// Bytes of memory that were copied, holes included.
    pub bytes: u64,
    /// Bytes of memory in total.
    pub total: u64,
    /// Numbers of data pages and holes that were copied.
    pub pages: PageCounts,
    /// Bytes that were read from memory: populated pages.
    pub from_memory: u64,
    /// Bytes that were read from sources: pages that are not populated.
    pub from_source: u64,
}

/// Errors from copying memory to an image. The memory is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteImageError {
    /// An image of another size than the memory.
    #[error(
        "cannot copy {memory} bytes of memory to an image of {image} bytes: the sizes differ; \
         create the image with the size of memory"
    )]
    Size {
        /// Size of all regions, in bytes.
        memory: u64,
        /// Size of the image, in bytes.
        image: u64,
    },
    /// A copy that the progress callback ended.
    #[error("copy of memory to an image cancelled after {bytes} of {total} bytes")]
    Cancelled {
        /// Bytes that were copied.
        bytes: u64,
        /// Bytes in total.
        total: u64,
    },
    /// A failure to write the image.
    #[error(transparent)]
    Write(#[from] ImageWriterError),
    /// A failure to read memory.
    #[error(
        "cannot copy memory to an image: reading {len} bytes at offset {offset} of the memory \
         object failed: {source}; check the kernel log for memory errors"
    )]
    Memory {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The system's error.
        source: io::Error,
    },
    /// A huge page that was being created throughout the wait: the hypervisor may have written to
    /// it.
    #[error(
        "cannot copy memory to an image: a huge page is still being created after {waited:?}; try \
         again when the source answers"
    )]
    Busy {
        /// Time spent waiting.
        waited: Duration,
    },
    /// Missing pages that their source did not deliver.
    #[error(
        "cannot copy memory to an image: the source failed {attempts} times at offset {offset}: \
         {source}; the VM can continue; try again when the source is available"
    )]
    Source {
        /// Offset in the source's image, in bytes.
        offset: u64,
        /// Number of attempts.
        attempts: u32,
        /// The source's last error.
        source: SourceError,
    },
}

impl<B: Bitmap> DemandMemory<B> {
    /// Copies all regions to an image, one behind the other: a region begins in the image where the
    /// one before it ends. The caller finishes the image.
    ///
    /// [Populated](crate::BitmapReader::is_populated) pages come from memory, the others straight
    /// from their source: they stay missing, and holes of the source are not read. Untouched memory
    /// is not allocated. At most 1 MiB is held in buffers.
    ///
    /// vCPUs, devices and all other writers to memory must be stopped meanwhile. Background fill
    /// and service threads may continue: no writer has reached a page that is not populated, so a
    /// page that becomes present is the same in memory and in its source.
    ///
    /// `progress` is called after each MiB, and repeatedly while a source is slow. It ends the copy
    /// by returning `false`. A source that fails is tried five times, with pauses of 750 ms in
    /// total, unless it says that another attempt is useless.
    ///
    /// # Errors
    ///
    /// [`WriteImageError`] names the failure. The image is then not usable; the memory is
    /// unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{BackingKind, DemandMemory, DemandRegion, MemfdBacking, Stats};
    /// use demand_source::ImageWriter;
    /// use std::sync::Arc;
    /// use vm_memory::{Bytes, GuestAddress};
    ///
    /// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
    /// let region =
    ///     DemandRegion::new_present(GuestAddress(0), backing, Arc::new(Stats::new()), ()).unwrap();
    /// let memory = DemandMemory::new(vec![region]).unwrap();
    /// memory.write_obj(7u8, GuestAddress(0x5000)).unwrap();
    ///
    /// let folder = tempfile::tempdir().unwrap();
    /// let (image, table) = (folder.path().join("memory"), folder.path().join("memory.hashes"));
    /// let mut writer = ImageWriter::create(&image, &table, 1 << 20, [0; 16]).unwrap();
    /// let done = memory.write_image(&mut writer, &mut |_| true).unwrap();
    /// assert_eq!((done.bytes, done.pages.data, done.pages.holes), (1 << 20, 1, 255));
    /// writer.finish().unwrap();
    /// ```
    pub fn write_image(
        &self,
        writer: &mut ImageWriter,
        progress: &mut dyn FnMut(ImageProgress) -> bool,
    ) -> Result<ImageProgress, WriteImageError> {
        let total = self.pagers().map(|pager| pager.pages() * PAGE_SIZE).sum();
        if total != writer.size() {
            return Err(WriteImageError::Size { memory: total, image: writer.size() });
        }
        let so_far = ImageProgress { total, ..ImageProgress::default() };
        let mut copy = Copy { writer, progress, so_far, buffer: Vec::new() };
        let mut base = 0;
        for region in self.iter() {
            copy.region(region, base)?;
            base += region.pager().pages() * PAGE_SIZE;
        }
        Ok(copy.so_far)
    }
}

/// A copy in progress.
struct Copy<'a> {
    writer: &'a mut ImageWriter,
    progress: &'a mut dyn FnMut(ImageProgress) -> bool,
    so_far: ImageProgress,
    /// A buffer that all reads reuse.
    buffer: Vec<u8>,
}

impl Copy<'_> {
    /// Copies a region to the image, from byte `base` on.
    fn region<B: Bitmap>(
        &mut self,
        region: &DemandRegion<B>,
        base: u64,
    ) -> Result<(), WriteImageError> {
        let (bitmap, pages) = (region.pager().bitmap(), region.pager().pages());
        self.await_units(region.pager())?;
        for first in (0..pages).step_by(to_usize(CHUNK)) {
            let chunk = PageRange::new(first, CHUNK.min(pages - first));
            let data_before = self.so_far.pages.data;
            let mut at = chunk.first;
            while at < chunk.end() {
                // Not only present pages: the guest may have written to a page that is mapped for
                // it and still counts as missing.
                let populated = bitmap.is_populated(at);
                let alike =
                    (at..chunk.end()).take_while(|page| bitmap.is_populated(*page) == populated);
                // The first page may have become populated between the two checks.
                let run = PageRange::new(at, (alike.count() as u64).max(1));
                if populated {
                    self.populated(region, base, run)?;
                } else {
                    let (source, image_offset) = region.pager().source();
                    self.missing(&**source, image_offset + run.offset(), base + run.offset(), run)?;
                }
                at = run.end();
            }
            self.so_far.bytes += chunk.bytes();
            self.so_far.pages.holes += chunk.count - (self.so_far.pages.data - data_before);
            self.report()?;
        }
        Ok(())
    }

    /// Waits for huge pages that are being created with their content: the hypervisor may already
    /// have written to them. It cannot reach those whose creation begins later, because vCPUs are
    /// stopped.
    fn await_units(&mut self, pager: &Pager) -> Result<(), WriteImageError> {
        let begun = Instant::now();
        while !pager.is_no_unit_loading() {
            let waited = begun.elapsed();
            if waited >= PATIENCE {
                return Err(WriteImageError::Busy { waited });
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Copies populated pages. The caller must have checked that they are populated before this
    /// asks the memory object for its holes.
    fn populated<B: Bitmap>(
        &mut self,
        region: &DemandRegion<B>,
        base: u64,
        run: PageRange,
    ) -> Result<(), WriteImageError> {
        let refused = |offset, len, source| WriteImageError::Memory { offset, len, source };
        let (mut at, end) = (run.offset(), run.offset() + run.bytes());
        while at < end {
            let extent = extent_of(&**region.pager().backing(), at, end);
            let extent = extent.map_err(|error| refused(at, end - at, error))?;
            let Some(extent) = extent else { return Ok(()) };
            let (pages, hole) = pages_of(extent, at, (end - at) / PAGE_SIZE);
            let len = pages * PAGE_SIZE;
            if !hole {
                self.buffer.resize(to_usize(len), 0);
                let read = region.pager().read_existing(&mut self.buffer, at);
                read.map_err(|error| refused(at, len, error))?;
                self.so_far.from_memory += len;
                self.write(base + at)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Copies missing pages from byte `offset` of their source to byte `to` of the image.
    fn missing(
        &mut self,
        source: &dyn PageSource,
        offset: u64,
        to: u64,
        run: PageRange,
    ) -> Result<(), WriteImageError> {
        let mut done = 0;
        while done < run.count {
            let here = done * PAGE_SIZE;
            let extent = self.persist(offset + here, |_| Ok(extent_now(source, offset + here)))?;
            let (pages, hole) = pages_of(extent, offset + here, run.count - done);
            if !hole {
                let len = pages * PAGE_SIZE;
                self.persist(offset + here, |copy| {
                    copy.read(source, offset + here, to_usize(len))
                })?;
                self.so_far.from_source += data_bytes(source, offset + here, len);
                self.write(to + here)?;
            }
            done += pages;
        }
        Ok(())
    }

    /// Asks a source until it answers, a limited number of times.
    fn persist<T>(
        &mut self,
        offset: u64,
        mut ask: impl FnMut(&mut Self) -> Result<Result<T, SourceError>, WriteImageError>,
    ) -> Result<T, WriteImageError> {
        let mut attempts = 1;
        let mut pauses = PAUSES.iter();
        loop {
            let error = match ask(self)? {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = pauses.next().filter(|_| error.retry() == Retry::Later);
            let Some(pause) = pause else {
                return Err(WriteImageError::Source { offset, attempts, source: error });
            };
            log::warn!(
                "cannot read missing pages for an image (attempt {attempts}): {error}; retrying"
            );
            thread::sleep(*pause);
            self.report()?;
            attempts += 1;
        }
    }

    /// Fills the buffer from a source.
    fn read(
        &mut self,
        source: &dyn PageSource,
        offset: u64,
        len: usize,
    ) -> Result<Result<(), SourceError>, WriteImageError> {
        self.buffer.resize(len, 0);
        let mut destination = Destination::from(&mut self.buffer[..]);
        if let Some(read) = source.read_now(offset, &mut destination) {
            return Ok(read.and_then(|()| destination.check_filled()));
        }
        let (destination, bytes) = Destination::owned(std::mem::take(&mut self.buffer));
        let chunks = vec![Chunk { offset, destination }];
        // Demand, because the VM is stopped while this waits.
        let request = Request { priority: Priority::Demand, chunks };
        let (sender, receiver) = mpsc::channel();
        source.submit(request).then(move |outcome| {
            // The receiver is gone if the copy was ended.
            let _ = sender.send(outcome);
        });
        let outcome = loop {
            match receiver.recv_timeout(WATCH) {
                Ok(outcome) => break outcome,
                Err(RecvTimeoutError::Timeout) => self.report()?,
                Err(RecvTimeoutError::Disconnected) => break Err(SourceError::Abandoned),
            }
        };
        // After a failure the source may still hold the bytes: the next attempt allocates new ones.
        let bytes = bytes.take();
        Ok(outcome.and_then(|()| {
            self.buffer = bytes?;
            Ok(())
        }))
    }

    /// Writes the buffer to byte `to` of the image.
    fn write(&mut self, to: u64) -> Result<(), WriteImageError> {
        self.so_far.pages.data += self.writer.write(to, &self.buffer)?.data;
        Ok(())
    }

    fn report(&mut self) -> Result<(), WriteImageError> {
        let ImageProgress { bytes, total, .. } = self.so_far;
        let may_continue = (self.progress)(self.so_far);
        if may_continue { Ok(()) } else { Err(WriteImageError::Cancelled { bytes, total }) }
    }
}
