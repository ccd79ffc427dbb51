// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw images on web servers and in object stores.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use demand_source::{
    Chunk, Completion, Destination, Extent, PageSource, Priority, Request, SourceError, to_usize,
};
use futures_util::future::try_join_all;

use crate::object::Object;
use crate::queue::{Limits, Queue};
use crate::runtime;
use crate::store::StoreError;

/// Longest read, in bytes: at 1 Gbit/s, 2 ms for demand and 8 ms for fill.
const DEMAND_READ: u64 = 256 << 10;
const FILL_READ: u64 = 1 << 20;
const LIMITS: Limits = Limits { demand: 64, fill: 16 };

/// A raw image that a web server or an object store has: all of it is data.
///
/// Each request in progress has a separate connection: demand does not wait behind fill. The object
/// must stay as it is: a change that shows in its length or its entity tag is an error.
pub struct ObjectImage {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    size: u64,
    demand: Object,
    fill: Object,
    queue: Queue,
}

impl ObjectImage {
    /// Opens an image. It costs one round trip, and reads one byte, which shows whether the server
    /// knows ranges.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub fn open(location: &crate::Location) -> Result<Self, StoreError> {
        let mut demand = Object::open(location)?;
        let mut fill = Object::open(location)?;
        let version = runtime::wait(demand.version())?;
        let size = version.size;
        demand.expect(version.clone());
        fill.expect(version);
        let queue = Queue::new(LIMITS);
        let name = location.to_string();
        Ok(ObjectImage { shared: Arc::new(Shared { name, size, demand, fill, queue }) })
    }
}

impl Shared {
    /// Reads a range into its destination.
    async fn read(
        &self,
        priority: Priority,
        offset: u64,
        mut destination: Destination<'static>,
    ) -> Result<(), SourceError> {
        let len = destination.len() as u64;
        let turn = self.queue.turn(priority, offset, len).await;
        if !destination.is_wanted() {
            return Err(SourceError::Withdrawn);
        }
        let object = match turn.priority {
            Priority::Demand => &self.demand,
            Priority::Fill => &self.fill,
        };
        let mut at = 0;
        let read = object.read(offset..offset + len, |bytes| {
            destination.write_at(at, bytes);
            at += bytes.len();
        });
        read.await.map_err(|error| {
            let retry = error.retry();
            SourceError::other(error, retry)
        })
    }

    fn check(&self, range: &Range<u64>) -> Result<(), SourceError> {
        if range.end <= self.size {
            return Ok(());
        }
        Err(SourceError::OutOfRange {
            image: self.name.clone(),
            offset: range.start,
            len: range.end - range.start,
            size: self.size,
        })
    }
}

/// Splits a chunk into reads of at most so many bytes.
fn split(chunk: Chunk, most: u64) -> Vec<(u64, Destination<'static>)> {
    let Chunk { mut offset, mut destination } = chunk;
    let mut parts = Vec::new();
    while destination.len() as u64 > most {
        let rest = destination.split_off(to_usize(most));
        parts.push((offset, std::mem::replace(&mut destination, rest)));
        offset += most;
    }
    parts.push((offset, destination));
    parts
}

impl PageSource for ObjectImage {
    fn size(&self) -> u64 {
        self.shared.size
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.shared.size })
    }

    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let Request { priority, chunks } = request;
        let shared = self.shared.clone();
        let most = if priority == Priority::Demand { DEMAND_READ } else { FILL_READ };
        let ranges = chunks
            .iter()
            .map(|chunk| chunk.offset..chunk.offset.saturating_add(chunk.destination.len() as u64));
        if let Some(error) = ranges.map(|range| shared.check(&range)).find_map(Result::err) {
            return Completion::ready(Err(error));
        }
        runtime::handle().spawn(async move {
            let parts = chunks.into_iter().flat_map(|chunk| split(chunk, most));
            let reads =
                parts.map(|(offset, destination)| shared.read(priority, offset, destination));
            let outcome = try_join_all(reads).await.map(drop);
            completer.complete(outcome);
        });
        completion
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.queue.raise(offset, len);
    }
}

impl fmt::Debug for ObjectImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectImage")
            .field("name", &self.shared.name)
            .field("size", &self.shared.size)
            .finish_non_exhaustive()
    }
}
