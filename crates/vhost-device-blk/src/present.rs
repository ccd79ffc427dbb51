// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waits for missing guest memory at a point where no other thread has to wait as well.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The smallest page size; a larger page is merely touched more than once.
const PAGE_SIZE: usize = 4096;

/// Reads a byte of each page of `slices` from user mode, so that the thread waits for missing pages
/// here, with no lock held. In a system call it would wait in the middle of the file system, which
/// writes under the image's inode lock: every other queue would wait too.
pub(crate) fn make_present<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) {
    for slice in slices {
        let start = slice.ptr_guard().as_ptr() as usize;
        let mut offset = 0;
        while offset < slice.len() {
            if let Ok(byte) = slice.subslice(offset, 1) {
                // A volatile read, which the compiler cannot optimize away.
                byte.copy_to(&mut [0u8]);
            }
            offset += PAGE_SIZE - ((start + offset) & (PAGE_SIZE - 1));
        }
    }
}
