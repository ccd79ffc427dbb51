// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A malicious back-end's mappings, and what it does to memory.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use demand_uffd::{Modes, Userfaultfd};

use super::deed::Mischief;

const PAGE: usize = 4096;
/// Bytes before and behind each mapping that nobody may change, and what each of them is.
const MARGIN: usize = 2 << 20;
const CANARY: u8 = 0xc5;

const PRIVATE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// How long a flood lasts.
const FLOOD: Duration = Duration::from_secs(3);

/// A mapping of a file between two canaries. It is never unmapped: threads may wait in it.
pub struct Guarded {
    start: *mut u8,
    len: usize,
}

// SAFETY: it is an address range of the process that is never unmapped as a whole, and all
// accesses to it are volatile.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    pub fn new(file: &File, len: u64) -> Self {
        let len = usize::try_from(len).unwrap();
        // Room for aligning it to a huge page.
        let room = len + 3 * MARGIN;
        let all = reserve(room);
        // SAFETY: both lie in the mapping that was just made, with a margin on either side.
        let start = unsafe { all.add(all.align_offset(MARGIN)).add(MARGIN) };
        // SAFETY: the margins lie in the mapping, which nobody else knows.
        unsafe {
            start.sub(MARGIN).write_bytes(CANARY, MARGIN);
            start.add(len).write_bytes(CANARY, PAGE);
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (shared, fd) = (libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd());
        // SAFETY: it replaces the middle of the mapping that was just made.
        let mapped = unsafe { libc::mmap(start.cast(), len, prot, shared, fd, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        Guarded { start, len }
    }

    pub fn base(&self) -> u64 {
        self.start as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        // SAFETY: within the mapping.
        unsafe { self.start.add(offset) }
    }

    /// Reads a byte; waits if its page is trapped.
    pub fn read(&self, offset: usize) -> u8 {
        // SAFETY: the byte lies in the mapping, and no reference to it exists.
        unsafe { self.at(offset).read_volatile() }
    }

    /// Reads a word; waits if its page is trapped.
    #[allow(dead_code)] // Only tests look at content.
    pub fn read_word(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: the word lies in the mapping, and no reference to it exists.
        unsafe { self.at(offset).cast::<u64>().read_volatile() }
    }

    /// Whether the canaries are as they were.
    pub fn is_intact(&self) -> bool {
        // SAFETY: the margins are ordinary memory of this process that nobody writes.
        let (before, behind) = unsafe {
            (
                std::slice::from_raw_parts(self.start.sub(MARGIN), MARGIN),
                std::slice::from_raw_parts(self.start.add(self.len), PAGE),
            )
        };
        before.iter().chain(behind).all(|byte| *byte == CANARY)
    }

    /// Moves it elsewhere, and puts private memory where it was.
    fn move_away(&self) {
        let elsewhere = reserve(self.len + MARGIN);
        // SAFETY: within the memory that was just made.
        let to = unsafe { elsewhere.add(elsewhere.align_offset(MARGIN)) };
        let (start, flags) = (self.start.cast(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: the range is this mapping, whose bytes nobody refers to, and the place is free.
        let moved = unsafe { libc::mremap(start, self.len, self.len, flags, to) };
        assert_ne!(moved, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let (prot, flags) = (libc::PROT_READ, PRIVATE | libc::MAP_FIXED);
        // SAFETY: nothing is there any more.
        unsafe { libc::mmap(start, self.len, prot, flags, -1, 0) };
    }
}

/// So much private memory, at an address of the kernel's choice.
pub fn reserve(len: usize) -> *mut u8 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping changes nothing that anybody refers to.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, PRIVATE, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// Moves a mapping away, under a thread that waits for its first page.
pub fn move_later(mapping: &Arc<Guarded>) {
    let reader = mapping.clone();
    thread::spawn(move || reader.read(0));
    thread::sleep(Duration::from_millis(50));
    mapping.move_away();
}

/// Touches all pages, from a thread of its own.
pub fn read_all(mapping: &Arc<Guarded>) -> thread::JoinHandle<()> {
    let mapping = mapping.clone();
    thread::spawn(move || {
        for offset in (0..mapping.len()).step_by(PAGE) {
            mapping.read(offset);
        }
    })
}

/// Touches a mapping's first page, and again whenever that was not served.
pub fn insist(mapping: &Arc<Guarded>, uffd: &Arc<Userfaultfd>) {
    let (_, mapping, uffd) = (read_all(mapping), mapping.clone(), uffd.clone());
    for_a_while(move |_| drop(uffd.wake(mapping.base(), mapping.len() as u64)));
}

/// Does what is done to memory before it may be used.
pub fn prefault(what: Mischief, mapping: &Arc<Guarded>) {
    let (at, len) = (mapping.at(0).cast(), mapping.len());
    let result = match what {
        Mischief::TouchEarly => {
            read_all(mapping).join().unwrap();
            0
        }
        // SAFETY: it touches pages of the mapping, and changes no byte.
        Mischief::PopulateEarly => unsafe { libc::madvise(at, len, libc::MADV_POPULATE_WRITE) },
        // SAFETY: as above.
        Mischief::LockEarly => unsafe { libc::mlock(at, len) },
        _ => 0,
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Does it. Floods go on after this has returned.
pub fn mischief(what: Mischief, mapping: &Arc<Guarded>, file: &File, uffd: &Arc<Userfaultfd>) {
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
            // SAFETY: of this mapping nothing is used any more but by the thread that reads, and
            // that dies with the process if it finds nothing.
            unsafe { libc::munmap(mapping.at(mapping.len() / 2).cast(), PAGE) };
            // Mapped again without a trap: so that thread does not end us.
            let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
            let offset = mapping.len() / 2;
            // SAFETY: as above.
            unsafe {
                let at = mapping.at(offset).cast();
                libc::mmap(at, PAGE, prot, flags, file.as_raw_fd(), offset as i64)
            };
        }
        Mischief::Truncate => {
            // What it comes to is seen in the front-end.
            let _ = file.set_len(0);
        }
        Mischief::Punch => {
            let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (fd, len) = (file.as_raw_fd(), mapping.len() as i64);
            // SAFETY: the call touches no memory of this process that anything refers to.
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

/// Memory that is trapped and no guest's, with four threads that wait for it.
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

/// An empty memory object.
pub fn tempfile_of(len: u64) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"malicious".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the kernel has just given us this descriptor.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}

fn forget(mapping: &Guarded, offset: usize) {
    let at = mapping.at(offset).cast();
    // SAFETY: the page is shared memory, whose object keeps its bytes, and nobody refers to it.
    unsafe { libc::madvise(at, PAGE, libc::MADV_DONTNEED) };
}

/// Does something again and again on a thread of its own, until the flood is over.
pub fn for_a_while(mut what: impl FnMut(usize) + Send + 'static) {
    thread::spawn(move || {
        let begun = Instant::now();
        let mut turn = 0;
        while begun.elapsed() < FLOOD {
            what(turn);
            turn += 1;
        }
    });
}
