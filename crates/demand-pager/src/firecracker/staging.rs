// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mapping that a handler fills.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use demand_source::{Part, to_usize};
use demand_uffd::{Features, Modes, Userfaultfd};
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Pages that are looked at by one call.
const SWEPT: usize = 1 << 18;

/// The mapping that a handler fills, and its userfaultfd.
///
/// Its features lack `EVENT_REMOVE`: handlers would take the release of a page for its removal by
/// the guest, and deliver zeros from then on.
pub(super) struct Staging {
    memory: MmapRaw,
    uffd: Userfaultfd,
    /// The handler has ended: pages read as zeros now.
    ended: AtomicBool,
    /// Pages that were served, as bits.
    served: Box<[AtomicU64]>,
}

/// The handler has ended before it delivered a page.
pub(super) struct Ended;

impl Staging {
    /// Maps `size` bytes.
    pub(super) fn new(size: u64) -> io::Result<Self> {
        let len = to_usize(size);
        if len == 0 || !len.is_multiple_of(PAGE) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the size of the memory is no multiple of 4096 bytes",
            ));
        }
        let memory = MmapRaw::from(MmapOptions::new().len(len).no_reserve_swap().map_anon()?);
        // A handler fills pages of 4096 bytes; and no child of this process has faults in it.
        memory.advise(Advice::NoHugePage)?;
        memory.advise(Advice::DontFork)?;
        let uffd = Userfaultfd::open_user_mode(Features::NONE).map_err(io::Error::other)?;
        let address = memory.as_mut_ptr().addr() as u64;
        uffd.register(address, size, Modes::MISSING).map_err(io::Error::other)?;
        let served = (0..(len / PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Staging { memory, uffd, ended: AtomicBool::new(false), served })
    }

    /// Returns the userfaultfd, for the handler.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.uffd.try_clone_fd()
    }

    /// Returns the message that Firecracker sends. It must be below 1024 bytes, as much as handlers
    /// receive. `page_size_kib` is in bytes in Firecracker, too, and was the only one before 1.12.
    pub(super) fn message(&self) -> String {
        let (address, size) = (self.memory.as_mut_ptr().addr(), self.memory.len());
        format!(
            "[{{\"base_host_virt_addr\":{address},\"size\":{size},\"offset\":0,\
             \"page_size\":{PAGE},\"page_size_kib\":{PAGE}}}]"
        )
    }

    /// Reads a part, whose range the caller has checked, and waits for the handler.
    pub(super) fn read(&self, part: &mut Part) -> Result<(), Ended> {
        let (start, len) = (to_usize(part.offset()), part.len());
        let mut page = [0; PAGE];
        let mut done = 0;
        while done < len {
            let at = start + done;
            let count = (PAGE - at % PAGE).min(len - done);
            let bytes = &mut page[..count];
            // SAFETY: the range lies in the mapping, and `bytes` outside it. This process does not
            // write the mapping, and the kernel makes each of its pages accessible only as a whole.
            // A system call could not read it: that of a page which is missing would fail.
            unsafe {
                let from = self.memory.as_ptr().add(at);
                std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), count);
            }
            // A load that waited while the handler ended has read zeros. The flag was set before.
            fence(Ordering::SeqCst);
            if self.ended.load(Ordering::SeqCst) {
                return Err(Ended);
            }
            part.destination().write_at(done, bytes);
            done += count;
        }
        let pages = start / PAGE..(start + len).div_ceil(PAGE);
        for page in pages.clone() {
            self.served[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
        self.release(pages.start, pages.len());
        Ok(())
    }

    /// Gives the memory of pages back. They are missing again.
    fn release(&self, first: usize, count: usize) {
        // SAFETY: the mapping has no references to its bytes, and its readers take bytes that were
        // missing meanwhile from the handler again.
        let _ = unsafe {
            let (offset, len) = (first * PAGE, count * PAGE);
            self.memory.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len)
        };
    }

    /// Releases pages that a handler has filled unasked after they were served.
    pub(super) fn sweep(&self) {
        let pages = self.memory.len() / PAGE;
        let mut resident = vec![0u8; SWEPT.min(pages)];
        for first in (0..pages).step_by(SWEPT) {
            let count = SWEPT.min(pages - first);
            // SAFETY: the range lies in the mapping, and the vector has a byte for each page.
            let looked = unsafe {
                let address = self.memory.as_mut_ptr().add(first * PAGE);
                libc::mincore(address.cast(), count * PAGE, resident.as_mut_ptr())
            };
            if looked != 0 {
                return;
            }
            let served = |page: usize| self.served[page / 64].load(Ordering::Relaxed);
            for page in (first..first + count).filter(|page| resident[page - first] & 1 != 0) {
                if served(page) & (1 << (page % 64)) != 0 {
                    self.release(page, 1);
                }
            }
        }
    }

    /// Ends all loads that wait, and all later ones: they deliver nothing.
    pub(super) fn end(&self) {
        // Before the kernel ends the waits of loads, which then read zeros.
        self.ended.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let (address, size) = (self.memory.as_mut_ptr().addr(), self.memory.len());
        if let Err(error) = self.uffd.unregister(address as u64, size as u64) {
            log::warn!("{error}");
        }
    }
}
