// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chunks that were decoded last, in memory, so that faults on neighbouring pages cost no
//! second request.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// The decoded chunks of one image that were used last, by their number.
#[derive(Debug)]
pub(crate) struct RecentChunks {
    /// Maximum number of bytes.
    most: usize,
    bytes: usize,
    chunks: HashMap<u64, (u64, Arc<Vec<u8>>)>,
    /// The chunks by the time of their last use.
    uses: BTreeMap<u64, u64>,
    now: u64,
}

impl RecentChunks {
    /// Creates room for at most `most` bytes.
    pub(crate) fn new(most: usize) -> Self {
        let (chunks, uses) = Default::default();
        RecentChunks { most, bytes: 0, chunks, uses, now: 0 }
    }

    /// Returns a chunk's content, which counts as used now.
    pub(crate) fn get(&mut self, chunk: u64) -> Option<Arc<Vec<u8>>> {
        let (used, content) = self.chunks.get_mut(&chunk)?;
        self.now += 1;
        self.uses.remove(&std::mem::replace(used, self.now));
        self.uses.insert(self.now, chunk);
        Some(content.clone())
    }

    /// Adds a chunk, in place of those that were not used for longest.
    pub(crate) fn insert(&mut self, chunk: u64, content: Arc<Vec<u8>>) {
        if content.len() > self.most {
            return;
        }
        self.now += 1;
        self.bytes += content.len();
        self.uses.insert(self.now, chunk);
        if let Some((used, old)) = self.chunks.insert(chunk, (self.now, content)) {
            self.uses.remove(&used);
            self.bytes -= old.len();
        }
        while self.bytes > self.most {
            let Some((_, oldest)) = self.uses.pop_first() else { return };
            let removed = self.chunks.remove(&oldest);
            self.bytes -= removed.map_or(0, |(_, content)| content.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_used_last_are_kept() {
        let mut recent = RecentChunks::new(30);
        let content = |byte| Arc::new(vec![byte; 10]);
        for chunk in 0..3 {
            recent.insert(chunk, content(1));
        }
        assert!(recent.get(0).is_some());
        recent.insert(3, content(2));
        recent.insert(3, content(3));
        assert!(recent.get(1).is_none());
        assert_eq!(*recent.get(3).unwrap(), [3; 10]);
        assert_eq!((recent.bytes, recent.chunks.len(), recent.uses.len()), (30, 3, 3));
        recent.insert(4, Arc::new(vec![0; 31]));
        assert!(recent.get(4).is_none() && recent.get(0).is_some());
    }
}
