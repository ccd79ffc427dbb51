// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads all chunks of a snapshot, pack by pack, in large requests.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use demand_source::to_usize;
use tokio::task::{JoinHandle, spawn_blocking};

use super::block::Entry;
use super::error::{ImageError, LayoutError};
use super::layout::{BLOCK_CHUNKS, Pack};
use super::names::{ObjectId, PACKS};
use super::snapshot::Snapshot;
use crate::runtime;

/// Maximum length of a request, in bytes.
const RUN: u32 = 8 << 20;
/// Bytes between two chunks that are read along with them.
const GAP: u32 = 64 << 10;
/// Number of requests in progress, each of which decodes what it read.
const AT_ONCE: usize = 4;

/// The chunks of a snapshot, by pack.
pub(crate) struct Walk {
    snapshot: Arc<Snapshot>,
    /// For each pack its chunks by their offsets in it.
    packs: Vec<Vec<(u64, Entry)>>,
    /// Whether packs are read as a whole, and checked against their names.
    whole: bool,
}

/// A part of a pack, and the chunks in it.
struct Run {
    pack: Pack,
    range: Range<u32>,
    chunks: Vec<(u64, Entry)>,
}

/// Numbers of chunks, each with its content.
type Contents = Vec<(u64, Vec<u8>)>;

impl Walk {
    /// Reads the index of a snapshot. With `whole`, the walk checks each pack against its name.
    pub(crate) async fn new(snapshot: Arc<Snapshot>, whole: bool) -> Result<Self, ImageError> {
        let mut packs = vec![Vec::new(); snapshot.head.packs.len()];
        let mut stored = 0_u64;
        let each = |number: u64, block: &super::block::Block| {
            for (chunk, entry) in (number * BLOCK_CHUNKS..).zip(block.entries()) {
                let Some(entry) = entry else { continue };
                stored += 1;
                // Decoding has checked the number of the pack.
                if let Some(chunks) = packs.get_mut(to_usize(u64::from(entry.pack))) {
                    chunks.push((chunk, *entry));
                }
            }
            Ok(())
        };
        snapshot.scan(each).await?;
        if stored != snapshot.head.stored {
            let what = "the number of stored chunks";
            let source = LayoutError::Bounds { what, value: snapshot.head.stored };
            return Err(snapshot.reads.altered(&snapshot.index(), source));
        }
        for chunks in &mut packs {
            chunks.sort_unstable_by_key(|(chunk, entry)| (entry.offset, *chunk));
        }
        Ok(Walk { snapshot, packs, whole })
    }

    /// Divides the packs into runs, in order.
    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (pack, chunks) in self.snapshot.head.packs.iter().zip(&self.packs) {
            let mut own: Option<Run> = None;
            for &(chunk, entry) in chunks {
                let end = entry.offset + entry.len;
                match &mut own {
                    Some(run)
                        if self.whole
                            || entry.offset <= run.range.end.saturating_add(GAP)
                                && end - run.range.start <= RUN =>
                    {
                        run.range.end = run.range.end.max(end);
                        run.chunks.push((chunk, entry));
                    }
                    _ => {
                        let range = entry.offset..end;
                        runs.extend(own.replace(Run {
                            pack: *pack,
                            range,
                            chunks: vec![(chunk, entry)],
                        }));
                    }
                }
            }
            if self.whole {
                let (range, chunks) = (0..pack.len, own.map(|run| run.chunks).unwrap_or_default());
                own = Some(Run { pack: *pack, range, chunks });
            }
            runs.extend(own);
        }
        runs
    }

    /// Reads, checks and decodes all chunks, and calls `each` with their numbers and contents, some
    /// at a time.
    pub(crate) async fn run(
        &self,
        mut each: impl FnMut(Contents) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut reads: VecDeque<Reading> = VecDeque::new();
        for run in self.runs() {
            if reads.len() == AT_ONCE
                && let Some(read) = reads.pop_front()
            {
                each(read.end().await?)?;
            }
            let read = read_run(self.snapshot.clone(), run, self.whole);
            reads.push_back(Reading(runtime::handle().spawn(read)));
        }
        while let Some(read) = reads.pop_front() {
            each(read.end().await?)?;
        }
        Ok(())
    }
}

/// A request in progress, which ends when it is dropped.
struct Reading(JoinHandle<Result<Contents, ImageError>>);

impl Reading {
    async fn end(mut self) -> Result<Contents, ImageError> {
        (&mut self.0).await.map_err(|_| ImageError::Panicked)?
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn read_run(snapshot: Arc<Snapshot>, run: Run, whole: bool) -> Result<Contents, ImageError> {
    let object = run.pack.id.within(PACKS);
    if whole {
        let (len, expected) = (snapshot.reads.len(&object).await?, u64::from(run.pack.len));
        if len != expected {
            let source = LayoutError::Length { what: "the pack", len, expected };
            return Err(snapshot.reads.altered(&object, source));
        }
    }
    let range = u64::from(run.range.start)..u64::from(run.range.end);
    let bytes = snapshot.reads.range(&object, range).await?;
    let decoded = spawn_blocking(move || {
        if whole && ObjectId::of(&bytes) != run.pack.id {
            let source = LayoutError::Digest { what: "the pack" };
            return Err(snapshot.reads.altered(&object, source));
        }
        decode_run(&snapshot, &run, &bytes)
    });
    decoded.await.map_err(|_| ImageError::Panicked)?
}

fn decode_run(snapshot: &Snapshot, run: &Run, bytes: &Bytes) -> Result<Contents, ImageError> {
    let decode = |(chunk, entry): &(u64, Entry)| {
        let start = (entry.offset - run.range.start) as usize;
        let stored = bytes.get(start..start + entry.len as usize).unwrap_or_default();
        Ok((*chunk, snapshot.decode(*chunk, entry, stored)?))
    };
    run.chunks.iter().map(decode).collect()
}
