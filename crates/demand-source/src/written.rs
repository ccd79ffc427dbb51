// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which bytes of a destination were written.

/// The bytes that were written so far, each counted once.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// All bytes up to here.
    prefix: usize,
    /// Ranges (start, end) after it that touch neither it nor each other. Sources mostly write in
    /// order, so there is mostly none.
    later: Vec<(usize, usize)>,
}

impl Written {
    /// Adds `len` bytes at `start`.
    pub(crate) fn add(&mut self, mut start: usize, len: usize) {
        if len == 0 {
            return;
        }
        // It lies in memory, whose addresses do not overflow.
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

    /// The number of bytes that were written.
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
