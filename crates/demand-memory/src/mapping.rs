// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory mappings that unmap themselves.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use demand_source::to_usize;

use crate::MappingGuard;

const ACCESSIBLE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A shared, writable mapping of a file from its first byte on, or of no file.
///
/// It is only an address range. Its creator decides how the bytes may be used, and arms it if
/// accesses must be trapped.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: u64,
    /// The trap of the range, dropped after the range is unmapped.
    guard: Mutex<Option<Arc<dyn MappingGuard>>>,
    /// Whether all access has ended.
    revoked: AtomicBool,
}

// SAFETY: a mapping is an address range of the process, which belongs to no thread, and this type
// gives no access to the bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above; the guard has a lock, and the methods only read the range or make system calls
// on it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file`, shared and writable. If the file consists of huge pages, all of
    /// them are reserved.
    ///
    /// # Errors
    ///
    /// The system's error: `ENOMEM` if the huge pages to reserve are not free.
    pub fn shared(file: &File, len: u64) -> io::Result<Self> {
        Self::map(len, ACCESSIBLE, 0, file.as_raw_fd())
    }

    /// Like [`shared`](Self::shared), but reserves no huge pages.
    pub(crate) fn shared_without_reservation(file: &File, len: u64) -> io::Result<Self> {
        Self::map(len, ACCESSIBLE, libc::MAP_NORESERVE, file.as_raw_fd())
    }

    /// Reserves huge pages for all `len` bytes of `file`. Unlike an accessible mapping, this
    /// allocates none of them in a process that locks its memory.
    pub(crate) fn reserve(file: &File, len: u64) -> io::Result<()> {
        Self::map(len, libc::PROT_NONE, 0, file.as_raw_fd()).map(drop)
    }

    /// Maps `len` bytes of zeros that belong to no file.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub fn anonymous(len: u64) -> io::Result<Self> {
        Self::map(len, ACCESSIBLE, libc::MAP_ANONYMOUS, -1)
    }

    fn map(
        len: u64,
        protection: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
    ) -> io::Result<Self> {
        let bytes =
            usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that
        // anything in this process refers to.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED | flags, fd, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).expect("mmap gives no null address");
        Ok(Mapping { address, len, guard: Mutex::default(), revoked: AtomicBool::new(false) })
    }

    /// Returns the address of the mapping's first byte.
    #[inline]
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Returns the length of the mapping, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether the mapping has no bytes, which is never the case: the kernel refuses to
    /// create one.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the address of the byte at `offset`.
    ///
    /// # Panics
    ///
    /// If `offset` lies past the end.
    pub fn at(&self, offset: u64) -> NonNull<u8> {
        assert!(
            offset <= self.len,
            "byte {offset} lies past the end of a mapping of {} bytes",
            self.len
        );
        // SAFETY: the assertion keeps the pointer within the mapping or one past its end, and a
        // mapping is smaller than `isize::MAX`.
        unsafe { self.address.add(to_usize(offset)) }
    }

    /// Sets the trap of this mapping, in place of the one before, and keeps it for as long as the
    /// mapping exists.
    pub fn set_guard(&self, guard: Arc<dyn MappingGuard>) {
        *self.guard.lock().unwrap_or_else(PoisonError::into_inner) = Some(guard);
    }

    /// Returns the trap of this mapping, if it has an active one.
    fn guard(&self) -> Option<Arc<dyn MappingGuard>> {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        guard.filter(|guard| guard.is_active())
    }

    /// Returns whether the mapping has an active trap, be it for some accesses only.
    pub(crate) fn is_trapped(&self) -> bool {
        self.guard().is_some()
    }

    /// Returns whether an access to any missing page is trapped here.
    pub fn traps_all(&self) -> bool {
        self.guard().is_some_and(|guard| guard.traps_all())
    }

    /// Ends all access to a trapped mapping for good: wakes every thread blocked on a fault in it,
    /// and turns each access in progress or in future into an error (of a system call, or of the
    /// hypervisor) or a signal. No missing page reads as zeros. A mapping without an active trap is
    /// left alone.
    ///
    /// It blocks on neither a page nor a source.
    ///
    /// # Errors
    ///
    /// The system's error. The mapping is then unchanged.
    pub fn revoke(&self) -> io::Result<()> {
        let Some(guard) = self.guard() else { return Ok(()) };
        // Access ends first: a thread woken before that would fault again and block again.
        // SAFETY: the range is this mapping, and no Rust reference points into it. Its content does
        // not change.
        let result = unsafe {
            libc::mprotect(self.address.as_ptr().cast(), to_usize(self.len), libc::PROT_NONE)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        self.revoked.store(true, Ordering::Release);
        guard.wake();
        Ok(())
    }

    /// Returns whether the mapping was [revoked](Self::revoke): nothing can access it any more.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Removes the trap of a mapping that nothing can access any more, either after
    /// [`revoke`](Self::revoke) or once its memslot is deleted, and wakes every thread blocked on a
    /// fault in it.
    pub fn remove_guard(&self) {
        if let Some(guard) = self.guard() {
            guard.remove();
        }
    }

    /// Removes all pages from the mapping, so that the next access to each is a fault. The memory
    /// object keeps them. This includes memory that the process has locked, which stays locked.
    ///
    /// # Errors
    ///
    /// The system's error: `EINVAL` before Linux 5.18 for locked memory and for huge pages.
    pub fn unmap_pages(&self) -> io::Result<()> {
        match self.advise(libc::MADV_DONTNEED) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.advise(libc::MADV_DONTNEED_LOCKED)
            }
            outcome => outcome,
        }
    }

    /// Keeps the mapping from child processes made by `fork`: an access of a child ends it with
    /// SIGSEGV. A child does not inherit the trap of a mapping, so missing pages would read as zeros
    /// there.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub fn hide_from_children(&self) -> io::Result<()> {
        self.advise(libc::MADV_DONTFORK)
    }

    /// Gives the kernel advice about the mapping, such as `MADV_HUGEPAGE`.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is this mapping. This crate gives advice about page sizes, advice
        // that unmaps pages of a shared mapping, whose object keeps them, or advice about child
        // processes; none changes content.
        let result =
            unsafe { libc::madvise(self.address.as_ptr().cast(), to_usize(self.len), advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and is unmapped once. All users of its address keep
        // the mapping alive while they use it.
        unsafe { libc::munmap(self.address.as_ptr().cast(), to_usize(self.len)) };
    }
}
