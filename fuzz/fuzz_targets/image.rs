// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes image files with odd lengths and holes that shrink while they are in use. A read returns
//! the image's content or an error, and never anything else; each page is read once.
#![no_main]

mod input;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, MemfdBacking, PAGE_SIZE, PageRange,
    PagerConfig, Retrier, RetryPolicy, Stats,
};
use demand_source::{Destination, Extent, LocalFile, PageSource};
use input::Input;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// Maximum length of an image, in bytes.
const MOST: u64 = 24 * PAGE_SIZE;

/// An image file, and a model of its content.
struct Image {
    file: File,
    model: Vec<u8>,
}

impl Image {
    fn new(input: &mut Input<'_>) -> Self {
        let len = input.below(MOST) + 1;
        let file = scratch();
        file.set_len(len).unwrap();
        let mut image = Image { file, model: vec![0; len as usize] };
        for _ in 0..input.byte() % 8 {
            let (start, count) = (input.below(len), input.below(5 * PAGE_SIZE));
            let end = len.min(start + count);
            if input.byte().is_multiple_of(3) {
                image.punch(start, end);
            } else {
                image.write(start, end, input.byte());
            }
        }
        image
    }

    fn write(&mut self, start: u64, end: u64, seed: u8) {
        for at in start..end {
            self.model[at as usize] = (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed;
        }
        if start < end {
            self.file.write_all_at(&self.model[start as usize..end as usize], start).unwrap();
        }
    }

    fn punch(&mut self, start: u64, end: u64) {
        self.model[start as usize..end as usize].fill(0);
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let len = end.saturating_sub(start);
        if len > 0 {
            // SAFETY: the call accesses no memory of this process.
            let result =
                unsafe { libc::fallocate(self.file.as_raw_fd(), how, start as i64, len as i64) };
            assert_eq!(result, 0);
        }
    }

    /// Truncates the file.
    fn shrink(&self, len: u64) {
        let before = self.file.metadata().unwrap().len();
        self.file.set_len(len.min(before)).unwrap();
    }

    /// Restores the file to its original length. It writes the content instead of extending the
    /// file first, because a concurrent read must not see a hole in place of data.
    fn restore(&self) {
        let now = self.file.metadata().unwrap().len();
        self.file.write_all_at(&self.model[now as usize..], now).unwrap();
    }

    fn len(&self) -> u64 {
        self.model.len() as u64
    }

    /// Checks that the extents which the source reports agree with the model.
    fn check_extent(&self, source: &LocalFile, offset: u64, intact: bool) {
        match source.extent(offset) {
            Err(_) => assert!(!intact || offset >= self.len(), "no extent at {offset}"),
            Ok(extent) => {
                let end = extent.end();
                assert!(offset < end && end <= self.len(), "{extent:?} at {offset}");
                if let Extent::Hole { end } = extent {
                    let hole = &self.model[offset as usize..end as usize];
                    assert!(hole.iter().all(|byte| *byte == 0), "data in {extent:?} at {offset}");
                }
            }
        }
    }

    fn check_read(&self, source: &LocalFile, offset: u64, len: u64, intact: bool) {
        let mut bytes = vec![0xee; len as usize];
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        match source.read_through(offset, &mut Destination::from(&mut bytes[..])) {
            Err(_) => assert!(!intact || !inside, "no read of {len} at {offset}"),
            Ok(()) => {
                assert!(inside, "{len} bytes at {offset} are not there");
                let model = &self.model[offset as usize..(offset + len) as usize];
                assert!(bytes == model, "wrong bytes: {len} at {offset}");
            }
        }
    }
}

/// Returns an empty file that supports holes.
fn scratch() -> File {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: memfd_create has just returned this descriptor, so no other code owns it.
    unsafe { File::from_raw_fd(fd) }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let image = Image::new(&mut input);
    let source = LocalFile::open(format!("/proc/self/fd/{}", image.file.as_raw_fd())).unwrap();
    assert_eq!(source.size(), image.len());
    for _ in 0..input.byte() % 8 {
        let (offset, len) = (input.below(MOST + PAGE_SIZE), input.below(3 * PAGE_SIZE));
        image.check_extent(&source, offset, true);
        image.check_read(&source, offset, len, true);
    }
    let (wild, len) = (input.word(), input.below(PAGE_SIZE));
    image.check_extent(&source, wild, true);
    image.check_read(&source, wild, len, true);

    // Fill memory from a part of the image. Behind its end, the last page is zeros.
    let pages = image.len().div_ceil(PAGE_SIZE);
    let mut model = image.model.clone();
    model.resize((pages * PAGE_SIZE) as usize, 0);
    let first = input.below(pages + 1);
    let size = (pages - first).max(1) * PAGE_SIZE;
    let stats = Arc::new(Stats::new());
    let policy = RetryPolicy {
        first: Duration::from_millis(1),
        longest: Duration::from_millis(1),
        limit: None,
    };
    let config = PagerConfig {
        backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, size).unwrap()),
        source: Arc::new(source),
        image_offset: first * PAGE_SIZE,
        stats: stats.clone(),
        retrier: Retrier::new(policy, |_| {}),
    };
    let Ok(region) = DemandRegion::new(GuestAddress(0), config, ()) else {
        assert!(first == pages, "a region within the image is refused");
        return;
    };
    assert!(first < pages, "a region past the end of the image is taken");
    let memory = DemandMemory::new(vec![region]).unwrap();
    let pager = memory.pagers().next().unwrap();
    let mut intact = true;
    let mut buffer = Vec::new();
    for _ in 0..input.byte() % 32 {
        let (at, what) = (input.below(size), input.byte());
        match what % 4 {
            0 if what >= 192 => {
                // After the file shrinks, reads may fail, but must not return wrong bytes.
                image.shrink(input.below(image.len()));
                intact = false;
            }
            0 => {
                let _ = pager.fetch(PageRange::page(at / PAGE_SIZE), FaultPath::Guest).unwrap();
            }
            1 => {
                let first = at / PAGE_SIZE;
                let count = (input.below(16) + 1).min(size / PAGE_SIZE - first);
                let _ = pager.fetch(PageRange::new(first, count), FaultPath::BackEnd).unwrap();
            }
            _ => {
                let len = input.below(3 * PAGE_SIZE).min(size - at);
                let range = PageRange::of_bytes(at, len);
                // Reading a missing page here would block forever.
                let _ = pager.fetch(range, FaultPath::Vmm).unwrap();
                if pager.bitmap().first_missing(range).is_some() {
                    assert!(!intact, "{range:?} of an intact image is not brought in");
                    continue;
                }
                buffer.resize(len as usize, 0);
                memory.read_slice(&mut buffer, GuestAddress(at)).unwrap();
                let from = (first * PAGE_SIZE + at) as usize;
                assert!(buffer == model[from..from + len as usize], "wrong bytes at {at}");
            }
        }
    }
    if !intact {
        // The user restores the file; failed fetches are retried.
        image.restore();
    }
    let all = PageRange::new(0, size / PAGE_SIZE);
    let _ = pager.fetch(all, FaultPath::Fill).unwrap();
    let begun = Instant::now();
    while !pager.bitmap().is_complete() {
        assert!(!intact && begun.elapsed() < Duration::from_secs(5), "pages never arrive");
        std::thread::sleep(Duration::from_micros(200));
    }
    buffer.resize(size as usize, 0);
    memory.read_slice(&mut buffer, GuestAddress(0)).unwrap();
    let from = (first * PAGE_SIZE) as usize;
    assert!(buffer == model[from..from + size as usize], "wrong bytes in the end");
    assert_eq!(stats.pages_arrived(), all.count, "each page arrives once");
});
