// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tracks which bytes of a destination have been written.

/// The set of bytes written so far.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// End of the first range: all bytes before it are written.
    prefix: usize,
    /// Ranges (start, end) after `prefix` that touch neither it nor each other. Sources mostly
    /// write in order, so this is usually empty.
    later: Vec<(usize, usize)>,
}

impl Written {
    /// Adds `len` bytes at `start`.
    pub(crate) fn add(&mut self, mut start: usize, len: usize) {
        if len == 0 {
            return;
        }
        // It cannot overflow: the range lies in memory.
        let mut end = start + len;
        self.later.retain(|&(first, last)| {
            let apart = last < start || end < first;
            if !apart {
                (start, end) = (start.min(first), end.max(last));
            }
            apart
        });
        if start > self.prefix {
            self.later.push((start, end));
        } else {
            self.prefix = self.prefix.max(end);
        }
    }

    /// Returns the number of bytes written, each counted once.
    pub(crate) fn bytes(&self) -> usize {
        self.prefix + self.later.iter().map(|(start, end)| end - start).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_byte_counts_once(writes in prop::collection::vec((0..64usize, 0..20usize), 0..40)) {
            let mut written = Written::default();
            let mut model = [false; 84];
            for (start, len) in writes {
                written.add(start, len);
                model[start..start + len].fill(true);
                prop_assert_eq!(written.bytes(), model.iter().filter(|byte| **byte).count());
            }
        }
    }
}
