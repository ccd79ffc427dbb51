// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A self-describing page or record: three words that name it, a checksum of the rest, and content
//! derived from its name.

use twox_hash::XxHash3_64;

/// Size of a block in bytes: a page of memory, or a record of the journal.
pub(crate) const SIZE: usize = 4096;
/// The name of a block: its number, its version, and its kind.
pub(crate) type Tags = [u64; 3];

const WORD: usize = 8;
const SUM: usize = 3 * WORD;
const CONTENT: usize = 4 * WORD;

/// A block, aligned for direct I/O.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Block(pub [u8; SIZE]);

impl Block {
    /// A block of zeros.
    pub(crate) const ZERO: Self = Self([0; SIZE]);

    /// Fills in the content of a block with this name.
    pub(crate) fn fill(&mut self, tags: Tags) {
        for (place, tag) in self.0.chunks_exact_mut(WORD).zip(tags) {
            place.copy_from_slice(&tag.to_le_bytes());
        }
        for (place, word) in self.0[CONTENT..].chunks_exact_mut(WORD).zip(content(tags)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let sum = self.sum();
        self.0[SUM..CONTENT].copy_from_slice(&sum.to_le_bytes());
    }

    /// Checks that it holds the content of a block with this name.
    ///
    /// # Errors
    ///
    /// A description of the difference.
    pub(crate) fn check(&self, tags: Tags) -> Result<(), String> {
        if self.tags() == tags && self.word(SUM) == self.sum() {
            return Ok(());
        }
        Err(self.difference(tags))
    }

    fn sum(&self) -> u64 {
        XxHash3_64::oneshot(&self.0[CONTENT..])
    }

    fn tags(&self) -> Tags {
        [0, WORD, 2 * WORD].map(|at| self.word(at))
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + WORD].try_into().expect("a word"))
    }

    fn difference(&self, tags: Tags) -> String {
        let found = self.tags();
        let mut other = Self::ZERO;
        other.fill(found);
        if found != tags && other.0 == self.0 {
            return format!("holds {found:x?}, whole, where {tags:x?} was written");
        }
        other.fill(tags);
        difference(&self.0, &other.0, tags)
    }
}

/// Checks that these bytes are the start of a block with this name.
///
/// # Errors
///
/// A description of the difference.
pub(crate) fn check_start(found: &[u8], tags: Tags) -> Result<(), String> {
    let mut block = Block::ZERO;
    block.fill(tags);
    let must = &block.0[..found.len().min(SIZE)];
    if found == must { Ok(()) } else { Err(difference(found, must, tags)) }
}

fn difference(found: &[u8], must: &[u8], tags: Tags) -> String {
    if found.iter().all(|byte| *byte == 0) {
        return format!("all zeros, where {tags:x?} was written");
    }
    let wrong = found.iter().zip(must).filter(|(is, must)| is != must).count();
    let at = found.iter().zip(must).position(|(is, must)| is != must).unwrap_or(0);
    let at = at / WORD * WORD;
    // The last word may be partial.
    let word = |bytes: &[u8]| {
        let bytes = bytes[at..].iter().take(WORD);
        bytes.rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
    };
    format!(
        "{wrong} bytes are not as they were written for {tags:x?}; at {at:#x} is {:#018x} for {:#018x}",
        word(found),
        word(must)
    )
}

fn content(tags: Tags) -> impl Iterator<Item = u64> {
    let seed = tags.iter().fold(0x2545_f491_4f6c_dd1d, |seed: u64, tag| step(seed ^ tag));
    std::iter::successors(Some(seed), |word| Some(step(*word)))
}

/// A step of a 64-bit generator; also serves to scatter a number.
pub(crate) fn step(word: u64) -> u64 {
    let word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        let tags = [5, 7, 9];
        let mut block = Block::ZERO;
        block.fill(tags);
        assert_eq!(block.check(tags), Ok(()));
        for at in 0..SIZE {
            block.0[at] ^= 1;
            assert!(block.check(tags).is_err(), "{at}");
            block.0[at] ^= 1;
        }
    }

    #[test]
    fn every_byte_of_a_start_counts() {
        let mut block = Block::ZERO;
        block.fill([5, 7, 9]);
        let mut start = block.0[..77].to_vec();
        assert_eq!(check_start(&start, [5, 7, 9]), Ok(()));
        for at in 0..start.len() {
            start[at] ^= 1;
            let why = check_start(&start, [5, 7, 9]).unwrap_err();
            assert!(why.starts_with("1 bytes are not"), "{why}");
            start[at] ^= 1;
        }
        assert!(check_start(&[0; 77], [5, 7, 9]).unwrap_err().contains("zeros"));
    }

    #[test]
    fn old_torn_and_zero_blocks_are_distinguished() {
        let mut block = Block::ZERO;
        assert!(block.check([1, 2, 3]).unwrap_err().contains("zeros"));
        block.fill([1, 2, 3]);
        assert!(block.check([1, 3, 3]).unwrap_err().contains("holds [1, 2, 3], whole"));
        let mut newer = Block::ZERO;
        newer.fill([1, 3, 3]);
        block.0[..SIZE / 2].copy_from_slice(&newer.0[..SIZE / 2]);
        let why = block.check([1, 3, 3]).unwrap_err();
        assert!(why.contains("at 0x800 is"), "{why}");
    }
}
