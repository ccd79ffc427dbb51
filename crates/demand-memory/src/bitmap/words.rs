// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of a bitmap, in memory that other processes can map.

use std::ops::Deref;

use crate::sync::AtomicU64;

/// An array of 64-bit words in a memfd.
///
/// The hypervisor reads it, and another process may map it read-only: the file is sealed against
/// all other writers. Its pages that were never written take no memory.
#[derive(Debug)]
pub(crate) struct Words {
    mapping: crate::mapping::Mapping,
    file: std::sync::Arc<std::fs::File>,
    len: usize,
}

impl Words {
    /// Creates `len` words, of which the first `ones` bits are set. `name` appears in
    /// `/proc/PID/fd` and `/proc/PID/maps`.
    ///
    /// # Errors
    ///
    /// The system's error if memory cannot be allocated.
    pub(crate) fn new(name: &std::ffi::CStr, len: usize, ones: u64) -> std::io::Result<Self> {
        let bytes = len.max(1).checked_mul(8);
        let bytes = bytes.ok_or_else(|| std::io::Error::from_raw_os_error(libc::EOVERFLOW))? as u64;
        let file = crate::backing::memfd(name, libc::MFD_ALLOW_SEALING)?;
        file.set_len(bytes)?;
        let mapping = crate::mapping::Mapping::shared(&file, bytes)?;
        set_first(&file, ones)?;
        // From here on, only that mapping can write to it.
        crate::backing::seal(&file, libc::F_SEAL_FUTURE_WRITE)?;
        Ok(Words { mapping, file: std::sync::Arc::new(file), len })
    }
}

/// Sets the first `bits` bits; all others are zero. Writes through the file: a mapping would fault
/// at each page, which for large memories is most of the time that a start takes.
fn set_first(file: &std::fs::File, bits: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;

    use demand_source::to_usize;
    static ONES: [u8; 1 << 16] = [0xff; 1 << 16];
    let (bytes, rest) = (bits / 8, bits % 8);
    let mut at = 0;
    while at < bytes {
        let now = (bytes - at).min(ONES.len() as u64);
        file.write_all_at(&ONES[..to_usize(now)], at)?;
        at += now;
    }
    // The first bits of a word are the low bits of its first bytes on a little-endian machine.
    const { assert!(cfg!(target_endian = "little")) };
    if rest > 0 {
        file.write_all_at(&[(1 << rest) - 1], bytes)?;
    }
    Ok(())
}

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words, is aligned to a page and lives as long as `self`.
        // All accesses to it are atomic: this process goes through the slice, the hypervisor only
        // reads, and the seals keep other processes from writing.
        unsafe { std::slice::from_raw_parts(self.mapping.address().cast().as_ptr(), self.len) }
    }
}

/// A read-only view of the words of a missing bitmap. The hypervisor and other processes read the
/// memory itself; the VMM's own code loads single words.
///
/// ```compile_fail,E0608
/// # use std::sync::atomic::Ordering;
/// # let bitmap = demand_memory::MissingBitmap::new(64).unwrap();
/// bitmap.words()[0].store(0, Ordering::Relaxed);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BitmapWords<'a>(&'a Words);

impl<'a> BitmapWords<'a> {
    pub(crate) fn new(words: &'a Words) -> Self {
        BitmapWords(words)
    }

    /// Returns the address of the first word, which does not change while the bitmap lives.
    pub fn as_ptr(&self) -> *const u64 {
        self.0.as_ptr().cast()
    }

    /// Returns the number of words.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether the array has no words, which is never the case.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns a word. The content of pages whose bits are clear in it is visible to the caller.
    ///
    /// # Panics
    ///
    /// If the word does not exist.
    pub fn load(&self, index: usize) -> u64 {
        self.0[index].load(crate::sync::Ordering::Acquire)
    }

    /// Returns the memfd that holds the words, from its first byte on. It is sealed: its holders
    /// can read it and map it for reading, and nothing else.
    pub fn file(&self) -> &'a std::sync::Arc<std::fs::File> {
        &self.0.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_words_than_memory_can_hold_are_refused() {
        // In 64 bits, the number of bytes would wrap around to a bitmap of a word or two.
        for len in [(1 << 61) + 1, (1 << 61) + 2, 1 << 61, usize::MAX] {
            let error = Words::new(c"test", len, 0).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EOVERFLOW), "{len:#x}");
        }
        assert!(Words::new(c"test", 1 << 60, 0).is_err());
    }
}
