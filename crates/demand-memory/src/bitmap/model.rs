// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of a bitmap for the model checker, which cannot explore memory of the kernel.

use std::ops::Deref;

use crate::sync::AtomicU64;

/// The words for the model checker.
#[derive(Debug)]
pub(crate) struct Words(Box<[AtomicU64]>);

impl Words {
    /// Creates `len` words, of which the first `ones` bits are set.
    pub(crate) fn new(_: &std::ffi::CStr, len: usize, ones: u64) -> std::io::Result<Self> {
        let words: Box<[_]> = (0..len).map(|_| AtomicU64::new(0)).collect();
        for (word, mask) in crate::PageRange::new(0, ones).words() {
            words[word].store(mask, crate::sync::Ordering::Relaxed);
        }
        Ok(Words(words))
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}
