// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The content of the test guest's memory image and disk: a function of a seed, so that any process
//! can compute any byte.

use demand_memory::to_usize;

/// Size of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Number of 64-bit words in a page.
pub const PAGE_WORDS: u64 = 512;
/// Number of pages in a unit: 2 MiB on every backing (on shmem, the chunk in which back-ends
/// fault).
pub const UNIT_PAGES: u64 = 512;
/// Size of a unit, in bytes.
pub const UNIT_BYTES: u64 = UNIT_PAGES * PAGE_BYTES as u64;
/// Number of units at the start that are never holes: their data pages hold the rings.
pub const NO_HOLE_UNITS: u64 = 2;

/// Number of pages in a run of holes.
const RUN_PAGES: u64 = 16;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns a well mixed function of `x`.
const fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Returns a well mixed function of a seed, a purpose and an index.
pub(crate) const fn hash(seed: u64, purpose: u64, index: u64) -> u64 {
    mixed(mixed(seed ^ purpose.wrapping_mul(STEP)).wrapping_add(index.wrapping_mul(STEP)))
}

/// Random numbers that depend only on a seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64, purpose: u64, index: u64) -> Self {
        Random(hash(seed, purpose, index))
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mixed(self.0)
    }

    /// Returns a number below `limit`, which must not be 0.
    pub(crate) const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, to_usize(self.below(i as u64 + 1)));
        }
    }
}

// Purposes of the hashes.
const FOR_WORDS: u64 = 1;
const FOR_UNITS: u64 = 2;
const FOR_RUNS: u64 = 3;
const FOR_PAGES: u64 = 4;
const FOR_CODE: u64 = 5;
const FOR_DISK: u64 = 6;

/// The kind of content of an image's page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// Zeros; a hole in the image file.
    Hole,
    /// A different word in every place: no two data words of an image are equal.
    Data,
    /// `mov rax, imm64; ret`, followed by data.
    Code,
}

/// The image of the test guest's memory.
///
/// # Examples
///
/// ```
/// use test_guest::content::{Class, Content};
///
/// let content = Content::new(7);
/// let page = (0..).find(|&page| content.class(page) == Class::Data).unwrap();
/// let mut bytes = [0; 4096];
/// content.page(page, &mut bytes);
/// assert_eq!(bytes[16..24], content.word(page, 2).to_le_bytes());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Content {
    seed: u64,
    key: u64,
}

/// Returns the data word with this index; a bijection, so that all words differ. In a loop over
/// indices the multiplication becomes an addition.
#[inline(always)]
const fn data_word(key: u64, index: u64) -> u64 {
    let x = key.wrapping_add(index.wrapping_mul(STEP));
    x ^ (x >> 32)
}

impl Content {
    /// Creates the image for `seed`.
    pub const fn new(seed: u64) -> Self {
        Content { seed, key: hash(seed, FOR_WORDS, 0) }
    }

    /// Returns the class of page `page`. Holes are single pages, runs and whole units.
    pub const fn class(&self, page: u64) -> Class {
        let unit = page / UNIT_PAGES;
        if unit >= NO_HOLE_UNITS && hash(self.seed, FOR_UNITS, unit) & 7 == 0 {
            return Class::Hole;
        }
        if hash(self.seed, FOR_RUNS, page / RUN_PAGES) & 7 == 0 {
            return Class::Hole;
        }
        match hash(self.seed, FOR_PAGES, page) & 15 {
            0 => Class::Hole,
            1 | 2 => Class::Code,
            _ => Class::Data,
        }
    }

    /// Returns the value that the function at the start of code page `page` returns in rax.
    pub const fn code_value(&self, page: u64) -> u64 {
        hash(self.seed, FOR_CODE, page)
    }

    /// Returns the first 16 bytes of a code page, as two words.
    fn code_words(&self, page: u64) -> [u64; 2] {
        let value = self.code_value(page);
        let behind = data_word(self.key, page * PAGE_WORDS + 1);
        // 48 b8 imm64: mov rax, imm64. c3: ret.
        [0xb848 | value << 16, value >> 48 | 0xc3 << 16 | behind << 24]
    }

    /// Returns word `index` (0 to 511) of page `page`.
    pub fn word(&self, page: u64, index: u64) -> u64 {
        match self.class(page) {
            Class::Hole => 0,
            Class::Code if index < 2 => self.code_words(page)[to_usize(index)],
            _ => data_word(self.key, page * PAGE_WORDS + index),
        }
    }

    /// Returns the eight bytes at `address`, which may be unaligned and span two pages.
    pub fn read_u64(&self, address: u64) -> u64 {
        let (index, shift) = (address / 8, address % 8 * 8);
        let low = self.word(index / PAGE_WORDS, index % PAGE_WORDS);
        if shift == 0 {
            return low;
        }
        let high = self.word((index + 1) / PAGE_WORDS, (index + 1) % PAGE_WORDS);
        low >> shift | high << (64 - shift)
    }

    /// Fills `bytes` with the content of page `page`.
    pub fn page(&self, page: u64, bytes: &mut [u8; PAGE_BYTES]) {
        let class = self.class(page);
        if class == Class::Hole {
            bytes.fill(0);
            return;
        }
        let (words, _) = bytes.as_chunks_mut::<8>();
        for (i, word) in words.iter_mut().enumerate() {
            *word = data_word(self.key, page * PAGE_WORDS + i as u64).to_le_bytes();
        }
        if class == Class::Code {
            let [first, second] = self.code_words(page);
            words[0] = first.to_le_bytes();
            words[1] = second.to_le_bytes();
        }
    }

    /// Returns whether `bytes` equals page `page`. Faster than generating the page and comparing.
    pub fn page_is(&self, page: u64, bytes: &[u8; PAGE_BYTES]) -> bool {
        let class = self.class(page);
        let (words, _) = bytes.as_chunks::<8>();
        let mut difference = 0;
        if class == Class::Hole {
            for word in words {
                difference |= u64::from_le_bytes(*word);
            }
            return difference == 0;
        }
        let mut from = 0;
        if class == Class::Code {
            let [first, second] = self.code_words(page);
            difference |= u64::from_le_bytes(words[0]) ^ first;
            difference |= u64::from_le_bytes(words[1]) ^ second;
            from = 2;
        }
        for (i, word) in words.iter().enumerate().skip(from) {
            let expected = data_word(self.key, page * PAGE_WORDS + i as u64);
            difference |= u64::from_le_bytes(*word) ^ expected;
        }
        difference == 0
    }
}

/// Returns the disk of `seed`: a function from a word's index to the word, which has no equal.
pub(crate) fn disk_words(seed: u64) -> impl Fn(u64) -> u64 {
    let key = hash(seed, FOR_DISK, 0);
    move |index| data_word(key, index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pages_and_unaligned_reads_agree() {
        let content = Content::new(3);
        let mut seen = [0; 3];
        let mut bytes = vec![0u8; 64 * PAGE_BYTES];
        for base in [0, 512, 700] {
            for page in 0..64 {
                let here: &mut [u8; PAGE_BYTES] =
                    bytes[to_usize(page) * PAGE_BYTES..].first_chunk_mut().unwrap();
                content.page(base + page, here);
                assert!(content.page_is(base + page, here));
                seen[content.class(base + page) as usize] += 1;
                for index in 0..PAGE_WORDS {
                    let at = to_usize(index) * 8;
                    assert_eq!(
                        u64::from_le_bytes(here[at..at + 8].try_into().unwrap()),
                        content.word(base + page, index)
                    );
                }
            }
            for at in (0..bytes.len() - 8).step_by(37) {
                let word = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
                assert_eq!(content.read_u64(base * PAGE_BYTES as u64 + at as u64), word);
            }
        }
        assert!(seen.iter().all(|&n| n > 0), "{seen:?}");
    }

    #[test]
    fn one_wrong_byte_is_seen() {
        let content = Content::new(4);
        let mut bytes = [0; PAGE_BYTES];
        for page in 0..100 {
            content.page(page, &mut bytes);
            for at in [0, 9, 10, 11, 15, 16, 2000, 4095] {
                bytes[at] ^= 1;
                assert!(!content.page_is(page, &bytes));
                bytes[at] ^= 1;
            }
            assert!(content.page_is(page, &bytes));
        }
    }

    #[test]
    fn code_pages_are_code() {
        let content = Content::new(5);
        let page = (0..).find(|&page| content.class(page) == Class::Code).unwrap();
        let mut bytes = [0; PAGE_BYTES];
        content.page(page, &mut bytes);
        assert_eq!(bytes[..2], [0x48, 0xb8]);
        assert_eq!(bytes[2..10], content.code_value(page).to_le_bytes());
        assert_eq!(bytes[10], 0xc3);
    }
}
