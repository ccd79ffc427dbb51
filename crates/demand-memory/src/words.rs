// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of a bitmap, in memory that can be shared.

use std::ops::Deref;

use crate::sync::AtomicU64;

/// An array of 64-bit words, zero at first.
///
/// It lies in a memfd, so that KVM reads it and another process may map it read-only; pages of it
/// that nobody wrote cost nothing.
#[cfg(not(loom))]
#[derive(Debug)]
pub struct Words {
    mapping: crate::mapping::Mapping,
    file: std::sync::Arc<std::fs::File>,
    len: usize,
}

#[cfg(not(loom))]
impl Words {
    /// Makes `len` words. `name` is what `/proc/PID/fd` and `/proc/PID/maps` call them.
    ///
    /// # Errors
    ///
    /// The system's, if the memory cannot be had.
    pub fn new(name: &std::ffi::CStr, len: usize) -> std::io::Result<Self> {
        let bytes = len.max(1).checked_mul(8);
        let bytes = bytes.ok_or_else(|| std::io::Error::from_raw_os_error(libc::EOVERFLOW))? as u64;
        let file = crate::backing::memfd(name, 0)?;
        file.set_len(bytes)?;
        let mapping = crate::mapping::Mapping::shared(&file, bytes, false)?;
        Ok(Words { mapping, file: std::sync::Arc::new(file), len })
    }

    /// Sets the first `bits` bits, all others being zero. Through the file: a mapping would fault
    /// at each page, which for large memories is most of what a start takes.
    ///
    /// # Errors
    ///
    /// The system's, if the memory cannot be had.
    pub(crate) fn set_first(&self, bits: u64) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        const ONES: [u8; 1 << 14] = [0xff; 1 << 14];
        let (bytes, rest) = (bits / 8, bits % 8);
        let mut at = 0;
        while at < bytes {
            let now = (bytes - at).min(ONES.len() as u64);
            self.file.write_all_at(&ONES[..now as usize], at)?;
            at += now;
        }
        // The first bits of a word are the low bits of its first bytes on a little-endian machine.
        const { assert!(cfg!(target_endian = "little")) };
        if rest > 0 {
            self.file.write_all_at(&[(1 << rest) - 1], bytes)?;
        }
        Ok(())
    }

    /// The memfd that holds the words, from its first byte on.
    pub fn file(&self) -> &std::sync::Arc<std::fs::File> {
        &self.file
    }
}

#[cfg(not(loom))]
impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words, is aligned to a page, was zeroed by the kernel
        // and lives as long as `self`. All accesses to it are atomic: ours go through the slice,
        // KVM only reads, and the memfd is given to others for reading only.
        unsafe { std::slice::from_raw_parts(self.mapping.address().cast().as_ptr(), self.len) }
    }
}

/// The words as the model checker sees them.
#[cfg(loom)]
#[derive(Debug)]
pub struct Words(Box<[AtomicU64]>);

#[cfg(loom)]
impl Words {
    /// Makes `len` words.
    pub fn new(_: &std::ffi::CStr, len: usize) -> std::io::Result<Self> {
        Ok(Words((0..len).map(|_| AtomicU64::new(0)).collect()))
    }

    /// Sets the first `bits` bits, all others being zero.
    pub(crate) fn set_first(&self, bits: u64) -> std::io::Result<()> {
        for (word, mask) in crate::PageRange::new(0, bits).words() {
            self.0[word].store(mask, crate::sync::Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(loom)]
impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn more_words_than_memory_can_hold_are_refused() {
        // 8 and 16 bytes too many for 64 bits, and what is left is a bitmap of one or two words.
        for len in [(1 << 61) + 1, (1 << 61) + 2, 1 << 61, usize::MAX] {
            let error = Words::new(c"test", len).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EOVERFLOW), "{len:#x}");
        }
        assert!(Words::new(c"test", 1 << 60).is_err());
    }
}
