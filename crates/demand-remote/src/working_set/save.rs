// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writing a working set at the end of a recording.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;
use demand_source::{
    Chunk, Completion, Destination, Extent, OwnedBytes, PageSource, Priority, Request, Retry,
    SourceError, to_usize,
};

use super::history::{Entry, merge};
use super::layout::{
    FRAME_PAGES, Frame, HEAD_BYTES, Head, ImageId, MOST_TABLE, Stored, ZERO_PAGES, encode_table,
};
use super::place::store_of;
use super::{WorkingSet, WorkingSetError};
use crate::Location;
use crate::image::chunk::Encoder;
use crate::image::format::digest;
use crate::image::layout::PAGE;
use crate::image::{Compression, LayoutError};

/// Number of reads of the image in flight, of up to 256 KiB each.
const READS: usize = 4;

/// A recording that has ended.
#[derive(Clone, Copy)]
pub struct Recording<'a> {
    /// The image.
    pub image: ImageId,
    /// The source of the image's pages. Those that were touched are read once more.
    pub source: &'a dyn PageSource,
    /// The pages of the image that were touched, by number and in order.
    pub touched: &'a [u64],
    /// The working set of earlier runs, to merge with.
    pub before: Option<&'a WorkingSet>,
}

impl fmt::Debug for Recording<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut recording = f.debug_struct("Recording");
        recording.field("image", &self.image).field("touched", &self.touched.len());
        recording.finish_non_exhaustive()
    }
}

/// A working set that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Number of pages.
    pub pages: u64,
    /// Those of them that are zeros, and take no bytes.
    pub zero_pages: u64,
    /// Length of the object, in bytes.
    pub bytes: u64,
}

/// Writes the working set of a recording to a place, in one request and in place of one that is
/// there. `go_on` is called often, and ends the work by returning `false`; nothing is written then.
///
/// # Errors
///
/// [`WorkingSetError::Source`], [`WorkingSetError::Cancelled`], [`WorkingSetError::Folder`],
/// [`WorkingSetError::Store`], and [`WorkingSetError::Layout`] for more pages than a working set
/// can have.
pub fn record(
    place: &Location,
    recording: Recording<'_>,
    go_on: &dyn Fn() -> bool,
) -> Result<Saved, WorkingSetError> {
    let Recording { image, source, touched, before } = recording;
    let name = || place.to_string();
    let (store, object) = store_of(place)?;
    let known: Vec<Entry> = before.iter().flat_map(|set| set.entries().copied()).collect();
    let runs = before.map_or(0, WorkingSet::runs);
    let mut entries = merge(&known, runs, touched);
    // A touch past the image's end is of a region that came later.
    entries.retain(|entry| entry.page < image.pages());
    let failed = |source| WorkingSetError::Source { place: name(), source };
    let mut packer = Packer::new().map_err(failed)?;
    let mut reads = VecDeque::new();
    let mut parts = entries.chunks(FRAME_PAGES);
    loop {
        while reads.len() < READS
            && let Some(part) = parts.next()
        {
            reads.push_back(Read::begin(source, part).map_err(failed)?);
        }
        let Some(read) = reads.pop_front() else { break };
        if !go_on() {
            return Err(WorkingSetError::Cancelled { place: name() });
        }
        read.end(&mut packer).map_err(failed)?;
    }
    let (frames, content) = packer.finish();
    let table = encode_table(&frames);
    if table.len() as u64 > MOST_TABLE {
        let (len, expected) = (table.len() as u64, MOST_TABLE);
        let source = LayoutError::Length { what: "the table of the working set", len, expected };
        return Err(WorkingSetError::Layout { place: name(), source });
    }
    let head = Head {
        image,
        runs: runs.saturating_add(1),
        frames: u32::try_from(frames.len()).expect("the table has several bytes for each"),
        table_len: table.len() as u64,
        len: (HEAD_BYTES + table.len() + content.len()) as u64,
        table: digest(&table),
    };
    let bytes = [&head.encode()[..], &table, &content].concat();
    if !go_on() {
        return Err(WorkingSetError::Cancelled { place: name() });
    }
    store.wait(store.put(&object, Bytes::from(bytes)))?;
    let zero = frames.iter().filter(|frame| frame.stored.is_none());
    let zero_pages = zero.map(|frame| frame.entries.len() as u64).sum();
    Ok(Saved { pages: entries.len() as u64, zero_pages, bytes: head.len })
}

/// Pages that are being read.
struct Read<'a> {
    entries: &'a [Entry],
    /// The content of each page that is data.
    content: Vec<Option<OwnedBytes>>,
    completion: Completion,
}

impl<'a> Read<'a> {
    fn begin(source: &dyn PageSource, entries: &'a [Entry]) -> Result<Self, SourceError> {
        let (mut chunks, mut content) = (Vec::new(), Vec::new());
        for entry in entries {
            let offset = entry.page * PAGE;
            if let Extent::Hole { end } = source.extent(offset)?
                && end >= offset + PAGE
            {
                content.push(None);
                continue;
            }
            let (destination, bytes) = Destination::owned(vec![0; to_usize(PAGE)]);
            chunks.push(Chunk { offset, destination });
            content.push(Some(bytes));
        }
        let completion = match chunks.is_empty() {
            true => Completion::ready(Ok(())),
            // Faults come first.
            false => source.submit(Request { priority: Priority::Fill, chunks }),
        };
        Ok(Read { entries, content, completion })
    }

    fn end(self, packer: &mut Packer) -> Result<(), SourceError> {
        self.completion.wait()?;
        for (entry, content) in self.entries.iter().zip(self.content) {
            match content {
                Some(bytes) => packer.add(*entry, &bytes.take()?),
                None => packer.zeros.push(*entry),
            }
        }
        Ok(())
    }
}

/// Packs pages into frames, in order.
struct Packer {
    encoder: Encoder,
    zeros: Vec<Entry>,
    /// The pages of the next frame.
    pending: Vec<(Entry, Vec<u8>)>,
    frames: Vec<Frame>,
    content: Vec<u8>,
}

impl Packer {
    fn new() -> Result<Self, SourceError> {
        let encoder = Encoder::new(Compression::default(), FRAME_PAGES * to_usize(PAGE));
        Ok(Packer {
            encoder: encoder.map_err(|error| SourceError::other(error, Retry::Later))?,
            zeros: Vec::new(),
            pending: Vec::new(),
            frames: Vec::new(),
            content: Vec::new(),
        })
    }

    fn add(&mut self, entry: Entry, content: &[u8]) {
        if content.iter().all(|byte| *byte == 0) {
            return self.zeros.push(entry);
        }
        self.pending.push((entry, content.to_vec()));
        if self.pending.len() == FRAME_PAGES {
            self.pack();
        }
    }

    /// Packs the pending pages into a frame.
    fn pack(&mut self) {
        // The order within a frame is free, and neighbours compress better.
        self.pending.sort_unstable_by_key(|(entry, _)| entry.page);
        let content: Vec<u8> = self.pending.iter().flat_map(|(_, bytes)| bytes).copied().collect();
        let entries = self.pending.drain(..).map(|(entry, _)| entry).collect();
        // None of these pages is all zeros.
        let Some((coding, bytes)) = self.encoder.encode(&content) else { return };
        let (len, digest) = (bytes.len() as u64, digest(&bytes));
        self.content.extend(bytes);
        let stored = Stored { coding, offset: 0, len, digest };
        self.frames.push(Frame { entries, stored: Some(stored) });
    }

    /// Returns the frames, those of zeros first, and their content.
    fn finish(mut self) -> (Vec<Frame>, Vec<u8>) {
        if !self.pending.is_empty() {
            self.pack();
        }
        self.zeros.sort_unstable_by_key(|entry| entry.page);
        let zeros = self.zeros.chunks(ZERO_PAGES);
        let mut frames: Vec<_> =
            zeros.map(|entries| Frame { entries: entries.to_vec(), stored: None }).collect();
        frames.append(&mut self.frames);
        (frames, self.content)
    }
}
