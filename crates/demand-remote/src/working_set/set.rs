// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A working set that was opened: its table is in memory, its frames are not.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;

use super::WorkingSetError;
use super::history::Entry;
use super::layout::{Frame, HEAD_BYTES, Head, ImageId, content_len, decode_table, run_of};
use super::place::{is_missing_path, store_of};
use crate::image::LayoutError;
use crate::image::format::{decode_chunk, digest};
use crate::{Location, Store, StoreError};

/// A working set that was opened.
pub struct WorkingSet {
    name: String,
    store: Store,
    object: String,
    head: Head,
    frames: Vec<Frame>,
    /// The frame of each page, and its position there.
    pages: HashMap<u64, (usize, usize)>,
}

impl WorkingSet {
    /// Opens the working set at a place, which must be that of the image. It takes two requests.
    ///
    /// # Errors
    ///
    /// [`WorkingSetError::Missing`], [`WorkingSetError::OtherImage`], [`WorkingSetError::Layout`],
    /// [`WorkingSetError::Folder`] and [`WorkingSetError::Store`].
    pub fn open(place: &Location, image: ImageId) -> Result<Self, WorkingSetError> {
        let name = place.to_string();
        if is_missing_path(place) {
            return Err(WorkingSetError::Missing { place: name });
        }
        let (store, object) = store_of(place)?;
        let failed = |error| match error {
            StoreError::Missing { .. } => WorkingSetError::Missing { place: name.clone() },
            // The object is shorter than a head.
            StoreError::Short { len, got, .. } => {
                let what = "the working set";
                let source = LayoutError::Length { what, len: got, expected: len };
                WorkingSetError::Layout { place: name.clone(), source }
            }
            error => error.into(),
        };
        let read = |range: Range<u64>| store.wait(store.get_range(&object, range));
        let layout = |source| WorkingSetError::Layout { place: name.clone(), source };
        let table_at = HEAD_BYTES as u64;
        let head = Head::decode(&read(0..table_at).map_err(failed)?).map_err(layout)?;
        if head.image != image {
            return Err(WorkingSetError::OtherImage { place: name });
        }
        let table = match head.table_len {
            0 => Bytes::new(),
            len => read(table_at..table_at + len).map_err(failed)?,
        };
        let frames = decode_table(&head, &table).map_err(layout)?;
        let mut pages = HashMap::new();
        for (number, frame) in frames.iter().enumerate() {
            let places = (0..).zip(&frame.entries);
            pages.extend(places.map(|(at, entry)| (entry.page, (number, at))));
        }
        Ok(WorkingSet { name, store, object, head, frames, pages })
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Returns the length of the object, in bytes.
    pub fn size(&self) -> u64 {
        self.head.len
    }

    /// Returns the number of runs that were recorded.
    pub fn runs(&self) -> u32 {
        self.head.runs
    }

    /// Returns the pages as ranges of page numbers of the image, in the order of their replay.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.frames.iter().flat_map(|frame| {
            let mut at = 0;
            std::iter::from_fn(move || {
                let first = frame.entries.get(at)?.page;
                let run = run_of(&frame.entries, at);
                at += usize::try_from(run).expect("at most the pages of a frame");
                Some(first..first + run)
            })
        })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.frames.iter().flat_map(|frame| &frame.entries)
    }

    pub(crate) fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Returns the frame of a page, and its position there.
    pub(crate) fn find(&self, page: u64) -> Option<(usize, usize)> {
        self.pages.get(&page).copied()
    }

    /// Reads, checks and decodes a frame with content.
    pub(crate) async fn read(&self, frame: usize) -> Result<Vec<u8>, WorkingSetError> {
        let frame = &self.frames[frame];
        let layout = |source| WorkingSetError::Layout { place: self.name.clone(), source };
        let Some(stored) = &frame.stored else { return Ok(vec![0; content_len(frame)]) };
        let at = stored.offset..stored.offset + stored.len;
        let bytes = self.store.get_range(&self.object, at).await?;
        if digest(&bytes) != stored.digest {
            return Err(layout(LayoutError::Digest { what: "a frame of the working set" }));
        }
        decode_chunk(stored.coding, &bytes, content_len(frame)).map_err(layout)
    }
}

impl fmt::Debug for WorkingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut set = f.debug_struct("WorkingSet");
        set.field("place", &self.name).field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}
