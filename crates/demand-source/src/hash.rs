// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hash of a page's content.

use twox_hash::XxHash3_64;

/// Bytes of a page. Each page has one hash.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Returns whether all bytes are zero.
fn is_zero(page: &[u8]) -> bool {
    // By cache lines: one comparison covers 64 bytes, and nearly every page of data already differs
    // from zero in its first line.
    page.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Returns the hash of a page of 4096 bytes: its XXH3-64 with seed 0 (see the xxHash
/// specification). The hash 0 is reserved for the page of zeros: content whose XXH3-64 is 0 has the
/// hash 1.
///
/// It detects accidental changes to a file. It does not protect against deliberate ones.
///
/// # Panics
///
/// If `page` is not 4096 bytes long.
///
/// # Examples
///
/// ```
/// use demand_source::page_hash;
///
/// let mut page = [0; 4096];
/// assert_eq!(page_hash(&page), 0);
/// page[4095] = 1;
/// assert_ne!(page_hash(&page), 0);
/// ```
pub fn page_hash(page: &[u8]) -> u64 {
    assert_eq!(page.len(), PAGE_BYTES, "a page has 4096 bytes");
    if is_zero(page) { 0 } else { XxHash3_64::oneshot(page).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_one_of_the_specification() {
        // Images outlive programs, so this value must never change. It is the one that the
        // reference implementation computes (xxHash 0.8, `XXH3_64bits`).
        let page: Vec<u8> = (0..PAGE_BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect();
        assert_eq!(page_hash(&page), 0x7135_ffa5_04f1_bc71);
    }

    #[test]
    fn one_set_bit_is_no_page_of_zeros() {
        for bit in (0..PAGE_BYTES * 8).step_by(61) {
            let mut page = [0; PAGE_BYTES];
            page[bit / 8] = 1 << (bit % 8);
            assert_ne!(page_hash(&page), 0, "bit {bit}");
        }
    }
}
