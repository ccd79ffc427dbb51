// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A malicious back-end's mappings of guest memory, and its misuse of them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use demand_uffd::{Modes, Userfaultfd};

use super::deed::Mischief;

const PAGE: usize = 4096;
/// Bytes before and behind each mapping that must not change, and the value of each.
const MARGIN: usize = 2 << 20;
const CANARY: u8 = 0xc5;

const PRIVATE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Duration of a flood.
const FLOOD: Duration = Duration::from_secs(3);

/// A mapping of a file between two canaries. It is never unmapped, because threads may wait in it.
pub(crate) struct Guarded {
    start: *mut u8,
    len: usize,
}

// SAFETY: the address range belongs to the process and is never unmapped as a whole, and all
// accesses to it are volatile.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    pub(crate) fn new(file: &File, len: u64) -> Self {
        let len = usize::try_from(len).unwrap();
        // Room to align the mapping to a huge page.
        let room = len + 3 * MARGIN;
        let all = reserve(room);
        // SAFETY: `room` leaves space for the alignment and for a margin on either side, so the
        // address lies in the new mapping.
        let start = unsafe { all.add(all.align_offset(MARGIN)).add(MARGIN) };
        // SAFETY: the margins lie in the new mapping, which no other code refers to.
        unsafe {
            start.sub(MARGIN).write_bytes(CANARY, MARGIN);
            start.add(len).write_bytes(CANARY, PAGE);
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (shared, fd) = (libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd());
        // SAFETY: this replaces the middle of the new mapping, which no other code refers to.
        let mapped = unsafe { libc::mmap(start.cast(), len, prot, shared, fd, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        Guarded { start, len }
    }

    pub(crate) fn base(&self) -> u64 {
        self.start as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        // SAFETY: the assertion keeps the address within the mapping.
        unsafe { self.start.add(offset) }
    }

    /// Reads a byte; blocks if its page is trapped.
    pub(crate) fn read(&self, offset: usize) -> u8 {
        // SAFETY: the byte lies in the mapping, and no reference to it exists.
        unsafe { self.at(offset).read_volatile() }
    }

    /// Reads a word; blocks if its page is trapped.
    #[allow(dead_code, reason = "only tests check content")]
    pub(crate) fn read_word(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: the word lies in the mapping, and no reference to it exists.
        unsafe { self.at(offset).cast::<u64>().read_volatile() }
    }

    /// Returns whether the canaries are unchanged.
    pub(crate) fn is_intact(&self) -> bool {
        // SAFETY: the margins are private memory of this process that no code writes after `new`.
        let (before, behind) = unsafe {
            (
                std::slice::from_raw_parts(self.start.sub(MARGIN), MARGIN),
                std::slice::from_raw_parts(self.start.add(self.len), PAGE),
            )
        };
        before.iter().chain(behind).all(|byte| *byte == CANARY)
    }

    /// Moves the mapping to another address, and maps private memory at the old one.
    fn move_away(&self) {
        let elsewhere = reserve(self.len + MARGIN);
        // SAFETY: `reserve` allocated room for the alignment, so the address lies in its mapping.
        let to = unsafe { elsewhere.add(elsewhere.align_offset(MARGIN)) };
        let (start, flags) = (self.start.cast(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: the range is this mapping, to whose bytes no reference exists, and the target is
        // unused.
        let moved = unsafe { libc::mremap(start, self.len, self.len, flags, to) };
        assert_ne!(moved, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let (prot, flags) = (libc::PROT_READ, PRIVATE | libc::MAP_FIXED);
        // SAFETY: the mapping has moved away, so nothing is mapped there.
        unsafe { libc::mmap(start, self.len, prot, flags, -1, 0) };
    }
}

/// Maps `len` bytes of private memory, at an address of the kernel's choice.
pub(crate) fn reserve(len: usize) -> *mut u8 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping does not affect existing memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, PRIVATE, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// Moves a mapping away while a thread waits for its first page.
pub(crate) fn move_later(mapping: &Arc<Guarded>) {
    let reader = mapping.clone();
    thread::spawn(move || reader.read(0));
    thread::sleep(Duration::from_millis(50));
    mapping.move_away();
}

/// Touches all pages on a new thread.
pub(crate) fn read_all(mapping: &Arc<Guarded>) -> thread::JoinHandle<()> {
    let mapping = mapping.clone();
    thread::spawn(move || {
        for offset in (0..mapping.len()).step_by(PAGE) {
            mapping.read(offset);
        }
    })
}

/// Touches a mapping's pages on a new thread, and wakes the thread repeatedly, so that it faults
/// again each time its fault was not resolved.
pub(crate) fn insist(mapping: &Arc<Guarded>, uffd: &Arc<Userfaultfd>) {
    let (_, mapping, uffd) = (read_all(mapping), mapping.clone(), uffd.clone());
    for_a_while(move |_| drop(uffd.wake(mapping.base(), mapping.len() as u64)));
}

/// Performs the part of a mischief that comes before memory may be used.
pub(crate) fn prefault(what: Mischief, mapping: &Arc<Guarded>) {
    let (at, len) = (mapping.at(0).cast(), mapping.len());
    let result = match what {
        Mischief::TouchEarly => {
            read_all(mapping).join().unwrap();
            0
        }
        // SAFETY: this populates pages of the mapping and changes no byte.
        Mischief::PopulateEarly => unsafe { libc::madvise(at, len, libc::MADV_POPULATE_WRITE) },
        // SAFETY: as above.
        Mischief::LockEarly => unsafe { libc::mlock(at, len) },
        _ => 0,
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Performs a mischief. Floods continue after this has returned.
pub(crate) fn mischief(
    what: Mischief,
    mapping: &Arc<Guarded>,
    file: &File,
    uffd: &Arc<Userfaultfd>,
) {
    match what {
        Mischief::Read | Mischief::TouchEarly | Mischief::PopulateEarly | Mischief::LockEarly => {
            read_all(mapping).join().unwrap()
        }
        Mischief::Outside => drop(touch_outside(uffd)),
        Mischief::FloodOutside => {
            let (outside, uffd) = (touch_outside(uffd), uffd.clone());
            for_a_while(move |_| drop(uffd.wake(outside.base(), outside.len() as u64)));
        }
        Mischief::Flood => {
            for thread in 0..4 {
                let mapping = mapping.clone();
                for_a_while(move |turn| {
                    let at = (turn * 4 + thread) * 37 * PAGE % mapping.len();
                    forget(&mapping, at);
                    mapping.read(at);
                });
            }
        }
        Mischief::Unmap => {
            let _ = read_all(mapping);
            // SAFETY: only the reading thread uses this mapping now. If it reads the unmapped page,
            // the process dies, which breaks no memory safety.
            unsafe { libc::munmap(mapping.at(mapping.len() / 2).cast(), PAGE) };
            // Maps the page again without a trap, so that the thread does not kill the process.
            let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
            let offset = mapping.len() / 2;
            // SAFETY: as above.
            unsafe {
                let at = mapping.at(offset).cast();
                libc::mmap(at, PAGE, prot, flags, file.as_raw_fd(), offset as i64)
            };
        }
        Mischief::Truncate => {
            // The front-end shows the effect.
            let _ = file.set_len(0);
        }
        Mischief::Punch => {
            let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (fd, len) = (file.as_raw_fd(), mapping.len() as i64);
            // SAFETY: the call affects no memory of this process that a reference exists to.
            unsafe { libc::fallocate(fd, how, 0, len) };
        }
        Mischief::Scribble => {
            for offset in (0..mapping.len()).step_by(7 * PAGE) {
                // SAFETY: the byte lies in the mapping, and no reference to it exists.
                unsafe { mapping.at(offset + 8).write_volatile(0xa5) };
            }
        }
    }
}

/// Maps trapped memory that is not guest memory, with four threads that wait for it.
fn touch_outside(uffd: &Arc<Userfaultfd>) -> Arc<Guarded> {
    let file = tempfile_of(16 * PAGE as u64);
    let outside = Arc::new(Guarded::new(&file, 16 * PAGE as u64));
    uffd.register(outside.base(), outside.len() as u64, Modes::MISSING).unwrap();
    for thread in 0..4 {
        let outside = outside.clone();
        thread::spawn(move || outside.read(thread * PAGE));
    }
    outside
}

/// Creates an empty memory object of `len` bytes.
pub(crate) fn tempfile_of(len: u64) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"malicious".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: memfd_create has just returned this descriptor, so no other code owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}

fn forget(mapping: &Guarded, offset: usize) {
    let at = mapping.at(offset).cast();
    // SAFETY: the page is shared memory, so its object keeps the bytes, and no reference to them
    // exists.
    unsafe { libc::madvise(at, PAGE, libc::MADV_DONTNEED) };
}

/// Calls `what` repeatedly on a new thread, until the flood is over.
pub(crate) fn for_a_while(mut what: impl FnMut(usize) + Send + 'static) {
    thread::spawn(move || {
        let begun = Instant::now();
        let mut turn = 0;
        while begun.elapsed() < FLOOD {
            what(turn);
            turn += 1;
        }
    });
}
