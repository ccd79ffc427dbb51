// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads and compresses the chunks of an image on two threads, in order.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use demand_source::{Destination, PageSource, to_usize};

use super::parent::Parent;
use crate::image::block::Entry;
use crate::image::chunk::{Coding, Compression, Encoder};
use crate::image::error::ImageError;
use crate::image::layout::Geometry;

/// Number of threads.
const THREADS: u64 = 2;
/// Number of chunks that a thread encodes before it turns to its next group.
const GROUP: u64 = 16;
/// Number of groups that each thread may be ahead.
const AHEAD: usize = 2;

/// A chunk of the image, ready to be written.
pub(super) enum Encoded {
    /// All zeros.
    Zero,
    /// The same as the parent's, which has this entry.
    Reused(Entry),
    /// The bytes to store.
    New(Coding, Vec<u8>),
}

type Group = Result<Vec<Encoded>, ImageError>;

/// The chunks of an image.
pub(super) struct Chunks<'a> {
    pub(super) image: &'a dyn PageSource,
    pub(super) geometry: Geometry,
    pub(super) compression: Compression,
    pub(super) parent: Option<&'a Parent<'a>>,
}

impl Chunks<'_> {
    /// Encodes all chunks and calls `each` with them in order, some at a time, beside the number of
    /// the first.
    pub(super) fn encode_all(
        &self,
        each: &mut dyn FnMut(u64, Vec<Encoded>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let groups = self.geometry.chunks().div_ceil(GROUP);
        thread::scope(|scope| {
            // Thread t encodes groups t, t + THREADS, and so on, so taking them in turns keeps order.
            let threads = (0..THREADS).map(|first| {
                let (sender, receiver) = sync_channel(AHEAD);
                let mine = (first..groups).step_by(to_usize(THREADS));
                (scope.spawn(move || self.encode(mine, &sender)), receiver)
            });
            let (threads, receivers): (Vec<_>, Vec<_>) = threads.unzip();
            let mut done = take_in_turns(groups, &receivers, each);
            // The threads end when nothing receives from them.
            drop(receivers);
            for thread in threads {
                if thread.join().is_err() {
                    done = Err(ImageError::Panicked);
                }
            }
            done
        })
    }

    fn encode(&self, groups: impl Iterator<Item = u64>, sender: &SyncSender<Group>) {
        let mut encoder = match ChunkEncoder::new(self) {
            Ok(encoder) => encoder,
            Err(error) => return drop(sender.send(Err(error))),
        };
        for group in groups {
            let first = group * GROUP;
            let chunks = first..(first + GROUP).min(self.geometry.chunks());
            let encoded: Group = chunks.map(|chunk| encoder.encode(chunk)).collect();
            let failed = encoded.is_err();
            if sender.send(encoded).is_err() || failed {
                return;
            }
        }
    }
}

fn take_in_turns(
    groups: u64,
    receivers: &[Receiver<Group>],
    each: &mut dyn FnMut(u64, Vec<Encoded>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    for (group, receiver) in (0..groups).zip(receivers.iter().cycle()) {
        let encoded = receiver.recv().map_err(|_| ImageError::Panicked)??;
        each(group * GROUP, encoded)?;
    }
    Ok(())
}

/// A thread's buffers.
struct ChunkEncoder<'a> {
    chunks: &'a Chunks<'a>,
    encoder: Encoder,
    content: Vec<u8>,
    /// A chunk of the parent's image.
    other: Vec<u8>,
    /// End of the hole that was found last, in bytes.
    hole: u64,
}

impl<'a> ChunkEncoder<'a> {
    fn new(chunks: &'a Chunks<'a>) -> Result<Self, ImageError> {
        let most = to_usize(chunks.geometry.chunk_size());
        let encoder = Encoder::new(chunks.compression, most).map_err(|source| {
            let path = format!("the compressor {}", chunks.compression).into();
            ImageError::File { path, source }
        })?;
        let (content, other) = Default::default();
        Ok(ChunkEncoder { chunks, encoder, content, other, hole: 0 })
    }

    fn encode(&mut self, chunk: u64) -> Result<Encoded, ImageError> {
        let Chunks { image, geometry, parent, .. } = *self.chunks;
        let offset = geometry.offset(chunk);
        // The image may end within its last page.
        let end = (offset + geometry.chunk_len(chunk) as u64).min(image.size());
        if self.hole <= offset {
            let extent = image.extent(offset)?;
            self.hole = if extent.is_hole() { extent.end() } else { 0 };
        }
        if self.hole >= end {
            return Ok(Encoded::Zero);
        }
        self.content.clear();
        self.content.resize(geometry.chunk_len(chunk), 0);
        let bytes = &mut self.content[..to_usize(end - offset)];
        image.read_through(offset, &mut Destination::from(bytes))?;
        let entry = parent.and_then(|parent| parent.entry(chunk));
        if let (Some(parent), Some(entry)) = (parent, entry)
            && parent.has_content(offset, &self.content, &mut self.other)?
        {
            return Ok(Encoded::Reused(entry));
        }
        let Some((coding, stored)) = self.encoder.encode(&self.content) else {
            return Ok(Encoded::Zero);
        };
        let same = entry.filter(|entry| {
            entry.coding == coding
                && entry.len as usize == stored.len()
                && entry.digest == crate::image::layout::digest(&stored)
        });
        Ok(same.map_or(Encoded::New(coding, stored), Encoded::Reused))
    }
}
