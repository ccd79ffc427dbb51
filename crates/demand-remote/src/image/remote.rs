// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `RemoteImage`, the pages of a snapshot in a store.

use std::fmt;
use std::sync::Arc;

use demand_source::{
    Completion, Destination, Extent, OtherSources, PageSource, Request, SourceError, to_usize,
};

use super::around::{AroundStats, FetchAround};
use super::error::ImageError;
use super::flights::{Flights, Limits};
use super::hedge::HedgeStats;
use super::job::{Part, write_zeros};
use super::layout::BLOCK_CHUNKS;
use super::manifest::Manifest;
use super::snapshot::{ReadStats, Snapshot};
use crate::Store;

/// Most blocks that one look at the image's holes covers, which bounds the work of one fault.
const LOOK: u64 = 64;

/// How a [`RemoteImage`] uses memory and the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteOptions {
    /// Maximum number of bytes of decoded chunks that the image keeps in memory.
    pub recent_bytes: usize,
    /// Number of requests to the store that may be in progress for faults.
    pub demand: usize,
    /// Number of requests to the store that may be in progress for background fill.
    pub fill: usize,
    /// The chunks that are fetched beside one that a fault needs.
    pub around: FetchAround,
}

impl Default for RemoteOptions {
    /// Returns 32 MiB, 64 requests for faults and 16 for fill, and no chunks beside.
    fn default() -> Self {
        RemoteOptions { recent_bytes: 32 << 20, demand: 64, fill: 16, around: FetchAround::Off }
    }
}

/// The figures of a [`RemoteImage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageFigures {
    /// Requests to the store that were answered, and the bytes of the answers.
    pub reads: ReadStats,
    /// Requests for faults that were made twice, because they were late.
    pub hedges: HedgeStats,
    /// The use of [`RemoteOptions::around`].
    pub around: AroundStats,
    /// Chunks and blocks that are on their way, or queued, for faults.
    pub demand_queue: usize,
    /// The same for background fill and for what is fetched beside faults.
    pub fill_queue: usize,
}

/// A handle that gives the figures of a [`RemoteImage`].
#[derive(Clone)]
pub struct ImageWatch {
    flights: Arc<Flights>,
}

impl ImageWatch {
    /// Returns the image's figures so far.
    pub fn figures(&self) -> ImageFigures {
        let reads = self.flights.snapshot().reads.stats();
        let (demand_queue, fill_queue) = self.flights.queues();
        let (hedges, around) = (self.flights.hedges.stats(), self.flights.around_stats());
        ImageFigures { reads, hedges, around, demand_queue, fill_queue }
    }
}

impl fmt::Debug for ImageWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ImageWatch").field(&self.figures()).finish()
    }
}

/// The image of a snapshot that was [pushed](super::Push) to a store.
///
/// Opening takes two rounds of requests, whatever the image's size. Blocks of the index are read
/// when a page of theirs is first requested. A page costs one request for its chunk, which all
/// requests for the chunk share; chunks that are all zeros are holes, and cost none. Chunks of one
/// request of fill that lie side by side in a pack cost one request of up to 1 MiB together.
/// Requests for faults never wait for those of background fill, and a chunk that fill has queued is
/// requested like a fault, by itself, once a thread waits for it. A request for a fault that is
/// later than nearly all before it is made a second time, at another source if the image has
/// [several](demand_source::Replicas), or else on another connection; at most one in 20 is.
///
/// Stored bytes are checked against their digest before they are decoded, and each page against its
/// hash afterwards. Bytes that differ are an error, never content.
///
/// Its functions that wait must not be called by threads of an asynchronous runtime. Dropping it
/// answers what is left with [`SourceError::Abandoned`].
pub struct RemoteImage {
    flights: Arc<Flights>,
}

impl RemoteImage {
    /// Opens a snapshot.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoSnapshot`] if the snapshot does not exist or its push has not finished,
    /// [`ImageError::Store`], [`ImageError::Manifest`] and [`ImageError::Altered`].
    pub fn open(store: &Store, snapshot: &str) -> Result<Self, ImageError> {
        RemoteImage::open_with(store, snapshot, RemoteOptions::default())
    }

    /// Opens a snapshot with other than the default options.
    ///
    /// # Errors
    ///
    /// The same as those of [`open`](Self::open).
    pub fn open_with(
        store: &Store,
        snapshot: &str,
        options: RemoteOptions,
    ) -> Result<Self, ImageError> {
        let snapshot = store.wait(Snapshot::open(store, snapshot))?;
        let RemoteOptions { recent_bytes, demand, fill, around } = options;
        let limits = Limits { demand, fill };
        #[cfg(feature = "cache")]
        let flights = Flights::new(snapshot, recent_bytes, limits, around, None);
        #[cfg(not(feature = "cache"))]
        let flights = Flights::new(snapshot, recent_bytes, limits, around);
        Ok(RemoteImage { flights })
    }

    /// Opens a snapshot whose chunks are shared with the other processes of this host: those that
    /// one of them has read come from the cache, and those that several need at once are requested
    /// from the store by one of them.
    ///
    /// A fault that is answered from the cache reads its page alone. It does not wait if the page
    /// is in the system's page cache.
    ///
    /// # Errors
    ///
    /// The same as those of [`open`](Self::open).
    #[cfg(feature = "cache")]
    pub fn open_cached(
        store: &Store,
        snapshot: &str,
        options: RemoteOptions,
        cache: crate::HostCache,
    ) -> Result<Self, ImageError> {
        let snapshot = store.wait(Snapshot::open(store, snapshot))?;
        let RemoteOptions { recent_bytes, demand, fill, around } = options;
        let host = Some(super::host::HostReads::new(cache));
        let flights = Flights::new(snapshot, recent_bytes, Limits { demand, fill }, around, host);
        Ok(RemoteImage { flights })
    }

    fn snapshot(&self) -> &Snapshot {
        self.flights.snapshot()
    }

    /// Returns the snapshot's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.snapshot().manifest
    }

    /// Returns the generation id of the image: see [`demand_source::HashedImage`].
    pub fn generation(&self) -> [u8; 16] {
        self.snapshot().head.generation
    }

    /// Returns the number of requests to the store so far.
    pub fn stats(&self) -> ReadStats {
        self.snapshot().reads.stats()
    }

    /// Returns the figures of the image so far.
    pub fn figures(&self) -> ImageFigures {
        self.watch().figures()
    }

    /// Returns a handle that gives the image's figures, also when the image is gone.
    pub fn watch(&self) -> ImageWatch {
        ImageWatch { flights: self.flights.clone() }
    }

    /// Returns the content of a side file. It does not wait unless the file is large.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoFile`], [`ImageError::Store`] and [`ImageError::Altered`].
    pub fn file(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let snapshot = self.snapshot();
        Ok(snapshot.reads.store.wait(snapshot.file(name))?.to_vec())
    }

    fn out_of_range(&self, offset: u64, len: u64) -> SourceError {
        let (image, size) = (self.snapshot().name.clone(), self.size());
        SourceError::OutOfRange { image, offset, len, size }
    }

    fn is_within(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size())
    }

    /// Returns the extent at `offset`, or `None` if the block of the chunk there is not known. It
    /// ends where the known blocks do.
    fn known_extent(&self, offset: u64) -> Option<Extent> {
        let snapshot = self.snapshot();
        let geometry = snapshot.head.geometry;
        let mut chunk = offset / geometry.chunk_size();
        let limit = (chunk / BLOCK_CHUNKS + LOOK).min(geometry.blocks());
        let mut zero = None;
        while chunk / BLOCK_CHUNKS < limit && chunk < geometry.chunks() {
            let block = chunk / BLOCK_CHUNKS;
            let behind = geometry.chunks_of(block).end;
            let (is_zero, count) = if snapshot.is_zero_block(block) {
                (true, behind - chunk)
            } else {
                let Some(block) = snapshot.known_block(block) else { break };
                let (is_zero, count) = block.run(to_usize(chunk % BLOCK_CHUNKS));
                (is_zero, count as u64)
            };
            if zero.is_some_and(|zero| zero != is_zero) {
                break;
            }
            zero = Some(is_zero);
            chunk += count;
            if chunk < behind {
                break;
            }
        }
        let end = self.size().min(geometry.offset(chunk));
        Some(if zero? { Extent::Hole { end } } else { Extent::Data { end } })
    }
}

impl PageSource for RemoteImage {
    fn size(&self) -> u64 {
        self.snapshot().head.geometry.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        if !self.is_within(offset, 1) {
            return Err(self.out_of_range(offset, 1));
        }
        if let Some(extent) = self.known_extent(offset) {
            return Ok(extent);
        }
        let snapshot = self.snapshot();
        let geometry = snapshot.head.geometry;
        let block = offset / geometry.chunk_size() / BLOCK_CHUNKS;
        let read = snapshot.reads.store.wait(self.flights.block(block));
        read.map_err(|error| {
            let retry = error.retry();
            SourceError::other(error, retry)
        })?;
        let all =
            Extent::Data { end: self.size().min(geometry.offset(geometry.chunks_of(block).end)) };
        Ok(self.known_extent(offset).unwrap_or(all))
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        if !self.is_within(offset, 1) {
            return Some(Err(self.out_of_range(offset, 1)));
        }
        let extent = self.known_extent(offset);
        if extent.is_none() {
            let chunk = offset / self.snapshot().head.geometry.chunk_size();
            self.flights.want_block(chunk / BLOCK_CHUNKS);
        }
        extent.map(Ok)
    }

    fn submit(&self, request: Request) -> Completion {
        for chunk in &request.chunks {
            let len = chunk.destination.len() as u64;
            if !self.is_within(chunk.offset, len) {
                return Completion::ready(Err(self.out_of_range(chunk.offset, len)));
            }
        }
        let (completer, completion) = Completion::pair();
        let ranges = request.chunks.into_iter().map(|chunk| (chunk.offset, chunk.destination));
        let chunk_size = self.snapshot().head.geometry.chunk_size();
        self.flights.route_all(Part::divide(ranges, chunk_size, request.priority, completer));
        completion
    }

    fn raise(&self, offset: u64, len: u64) {
        let chunk_size = self.snapshot().head.geometry.chunk_size();
        let last = offset.saturating_add(len.saturating_sub(1));
        self.flights.raise(offset / chunk_size, last / chunk_size);
    }

    fn set_others(&self, others: OtherSources) {
        // The first combination of sources counts.
        let _ = self.flights.others.set(others);
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let len = destination.len();
        if !self.is_within(offset, len as u64) {
            return Some(Err(self.out_of_range(offset, len as u64)));
        }
        let chunk_size = self.snapshot().head.geometry.chunk_size();
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (chunk, start) = (at / chunk_size, to_usize(at % chunk_size));
            let count = (len - done).min(to_usize(chunk_size) - start);
            match self.snapshot().known_entry(chunk)? {
                None => write_zeros(destination, done, count),
                Some(entry) => {
                    let deliver = |bytes: &[u8]| destination.write_at(done, bytes);
                    if !self.flights.read_now(chunk, &entry, (start, count), deliver) {
                        return None;
                    }
                }
            }
            done += count;
        }
        Some(Ok(()))
    }
}

impl Drop for RemoteImage {
    fn drop(&mut self) {
        self.flights.abandon();
    }
}

impl fmt::Debug for RemoteImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Snapshot { name, reads, .. } = self.snapshot();
        f.debug_struct("RemoteImage").field("snapshot", name).field("store", &reads.store).finish()
    }
}
