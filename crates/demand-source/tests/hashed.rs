// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images with page hashes: reads return what was written, and later changes to the files are
//! detected before the page is delivered.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use demand_source::{
    Destination, Extent, HashedImage, ImageWriter, PageCounts, PageSource, SourceError, page_hash,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
/// More than two blocks of the table; a block is 512 pages.
const MOST_PAGES: u64 = 1300;

/// An image on the disk, and the fill byte of each of its data pages.
struct Pair {
    _folder: tempfile::TempDir,
    image: PathBuf,
    table: PathBuf,
    pages: u64,
    data: BTreeMap<u64, u8>,
}

impl Pair {
    /// Writes an image in steps of (first page, number of pages, fill byte); the byte 0 makes a
    /// hole.
    fn write(pages: u64, steps: &[(u64, u64, u8)]) -> Pair {
        Pair::write_in(tempfile::tempdir().unwrap(), pages, steps)
    }

    /// Like [`write`](Self::write), but in this folder.
    fn write_in(folder: tempfile::TempDir, pages: u64, steps: &[(u64, u64, u8)]) -> Pair {
        let (image, table) = (folder.path().join("image"), folder.path().join("table"));
        let mut writer = ImageWriter::create(&image, &table, pages * PAGE, [5; 16]).unwrap();
        let mut data = BTreeMap::new();
        for (first, count, byte) in steps {
            // Each page is written once.
            let new = (*first..first + count).take_while(|page| !data.contains_key(page)).count();
            let mut bytes = vec![*byte; new * PAGE as usize];
            // Each page contains its number, so that pages with the same fill byte differ.
            for (page, content) in (*first..).zip(bytes.chunks_exact_mut(PAGE as usize)) {
                if *byte != 0 {
                    content[..8].copy_from_slice(&page.to_le_bytes());
                    data.insert(page, *byte);
                }
            }
            let counts = writer.write(first * PAGE, &bytes).unwrap();
            let new = new as u64;
            let expected = if *byte == 0 { (0, new) } else { (new, 0) };
            assert_eq!(counts, PageCounts { data: expected.0, holes: expected.1 });
        }
        let summary = writer.finish().unwrap();
        let held = data.len() as u64;
        assert_eq!(summary.pages, PageCounts { data: held, holes: pages - held });
        assert_eq!((summary.size, summary.bytes_written), (pages * PAGE, held * PAGE));
        Pair { _folder: folder, image, table, pages, data }
    }

    fn open(&self) -> Result<HashedImage, SourceError> {
        HashedImage::open(&self.image, &self.table)
    }

    fn content(&self, page: u64) -> Vec<u8> {
        let mut content = vec![self.data.get(&page).copied().unwrap_or(0); PAGE as usize];
        if self.data.contains_key(&page) {
            content[..8].copy_from_slice(&page.to_le_bytes());
        }
        content
    }

    fn writable(&self, path: &PathBuf) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    /// Fetches a page the way a pager does.
    fn fetch(&self, source: &HashedImage, page: u64) -> Result<Vec<u8>, SourceError> {
        let mut content = vec![0xee; PAGE as usize];
        match source.extent(page * PAGE)? {
            Extent::Hole { end } if end - page * PAGE >= PAGE => content.fill(0),
            _ => source.read_through(page * PAGE, &mut Destination::from(&mut content[..]))?,
        }
        Ok(content)
    }

    /// Fetches all pages, on a new thread, which remembers no extents.
    fn fetch_all(
        &self,
        source: &HashedImage,
        mut each: impl FnMut(u64, Result<Vec<u8>, SourceError>) + Send,
    ) {
        let all = || (0..self.pages).for_each(|page| each(page, self.fetch(source, page)));
        std::thread::scope(|scope| scope.spawn(all).join().unwrap());
    }

    /// Asserts that exactly these pages are refused as altered, however they are read, and that all
    /// others have their original content.
    fn only_these_differ(&self, source: &HashedImage, altered: &[u64]) {
        self.fetch_all(source, |page, fetched| match fetched {
            Ok(content) => {
                assert!(!altered.contains(&page), "page {page} was delivered");
                assert!(content == self.content(page), "page {page}");
            }
            Err(SourceError::Altered { offset, .. }) => {
                assert_eq!(offset, page * PAGE);
                assert!(altered.contains(&page), "page {page} was refused");
            }
            Err(error) => panic!("page {page}: {error}"),
        });
        for page in altered {
            assert!(source.mapped(page * PAGE, PAGE).is_none());
            // One byte of the page, as a tool may read it.
            let mut byte = [0xee];
            let read = source.read_through(page * PAGE + 77, &mut Destination::from(&mut byte[..]));
            assert!(matches!(read, Err(SourceError::Altered { .. })), "{read:?}");
        }
        let verified = source.verify(&mut |_| true);
        match altered.iter().min() {
            None => verified.unwrap(),
            Some(first) => {
                let found = matches!(verified, Err(SourceError::Altered { offset, .. })
                    if offset == first * PAGE);
                assert!(found, "{verified:?} instead of page {first}");
            }
        }
    }
}

fn punch(file: &File, offset: u64, len: u64) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate accesses no memory of this process.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn flip(file: &File, bit: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

fn steps() -> impl Strategy<Value = (u64, Vec<(u64, u64, u8)>)> {
    let pages = prop_oneof![1..40u64, 500..MOST_PAGES];
    pages.prop_flat_map(|pages| {
        let step = (0..pages, 1..600u64, any::<u8>())
            .prop_map(move |(first, count, byte)| (first, count.min(pages - first), byte));
        (Just(pages), prop::collection::vec(step, 0..6))
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn written_content_is_read_back(
        (pages, steps) in steps(),
        reads in prop::collection::vec((0..MOST_PAGES * PAGE, 0..20_000usize), 0..10),
    ) {
        let pair = Pair::write(pages, &steps);
        let source = pair.open().unwrap();
        prop_assert_eq!((source.generation(), source.size()), ([5; 16], pages * PAGE));
        pair.only_these_differ(&source, &[]);

        let all: Vec<u8> = (0..pages).flat_map(|page| pair.content(page)).collect();
        for (at, count) in reads {
            let mut bytes = vec![0xee; count];
            let read = source.read_through(at, &mut Destination::from(&mut bytes[..]));
            match all.get(at as usize..at as usize + count) {
                Some(expected) => prop_assert!(read.is_ok() && bytes == expected, "{count} at {at}"),
                None => {
                    let refused = matches!(read, Err(SourceError::OutOfRange { .. }));
                    prop_assert!(refused, "{count} at {at}: {read:?}");
                }
            }
        }

        // The extents cover the image, and no hole is longer than 2 MiB.
        let mut at = 0;
        while at < source.size() {
            let extent = source.extent(at).unwrap();
            prop_assert!(at < extent.end() && extent.end() <= source.size());
            if extent.is_hole() {
                prop_assert!(extent.end() - at <= 2 << 20);
                prop_assert!(all[at as usize..extent.end() as usize].iter().all(|b| *b == 0));
            }
            at = extent.end();
        }
        prop_assert!(source.extent(at).is_err());

        // Progress increases up to the image's size, and can cancel the check.
        let mut last = 0;
        source.verify(&mut |at| { assert!(at > last); last = at; true }).unwrap();
        prop_assert_eq!(last, source.size());
        let ended = source.verify(&mut |_| false);
        let cancelled = matches!(ended, Err(SourceError::Cancelled { at, .. }) if at > 0);
        prop_assert!(cancelled, "{ended:?}");
    }

    #[test]
    fn each_change_is_found(
        (pages, steps) in steps(),
        victim: prop::sample::Index,
        bit in 0..PAGE * 8,
        hash_bit in 0..64u64,
    ) {
        let pair = Pair::write(pages, &steps);
        let source = pair.open().unwrap();
        let (image, table) = (pair.writable(&pair.image), pair.writable(&pair.table));
        let page = victim.index(pages as usize) as u64;

        // A bit of the page, whether data or a hole.
        flip(&image, page * PAGE * 8 + bit);
        pair.only_these_differ(&source, &[page]);
        flip(&image, page * PAGE * 8 + bit);
        pair.only_these_differ(&source, &[]);

        // A bit of its hash.
        flip(&table, (PAGE + page * 8) * 8 + hash_bit);
        pair.only_these_differ(&source, &[page]);
        flip(&table, (PAGE + page * 8) * 8 + hash_bit);

        // Lost data.
        if let Some((page, _)) = pair.data.iter().nth(victim.index(pair.data.len().max(1))) {
            punch(&image, page * PAGE, PAGE);
            pair.only_these_differ(&source, &[*page]);
            // Half of a page: a hole if the file system has smaller blocks, otherwise zeros.
            image.write_all_at(&pair.content(*page), page * PAGE).unwrap();
            punch(&image, page * PAGE + 2048, 2048);
            pair.only_these_differ(&source, &[*page]);
            image.write_all_at(&pair.content(*page), page * PAGE).unwrap();
            punch(&table, PAGE + page * 8, 8);
            pair.only_these_differ(&source, &[*page]);
        }
    }

    #[test]
    fn shorter_files_are_found(
        (pages, steps) in steps(),
        cut: prop::sample::Index,
        cut_table: prop::sample::Index,
    ) {
        let pair = Pair::write(pages, &steps);
        let source = pair.open().unwrap();
        let image = pair.writable(&pair.image);
        let end = cut.index((pages * PAGE) as usize) as u64;
        image.set_len(end).unwrap();
        pair.fetch_all(&source, |page, fetched| match fetched {
            Ok(content) => {
                assert!((page + 1) * PAGE <= end, "page {page} ends behind {end}");
                assert!(content == pair.content(page));
            }
            // A page before the end may be refused with the rest of its extent, if it is a hole.
            Err(error) => assert!(matches!(error, SourceError::Shrunk { .. }), "{page}: {error}"),
        });
        prop_assert!(source.mapped(end - end % PAGE, PAGE).is_none());
        prop_assert!(source.verify(&mut |_| true).is_err());
        let refused = pair.open();
        prop_assert!(matches!(refused, Err(SourceError::Table { .. })), "{refused:?}");

        let pair = Pair::write(pages, &steps);
        let source = pair.open().unwrap();
        let table = pair.writable(&pair.table);
        let end = cut_table.index((PAGE + pages * 8) as usize) as u64;
        table.set_len(end).unwrap();
        pair.fetch_all(&source, |page, fetched| match fetched {
            Ok(content) => {
                assert!(PAGE + (page + 1) * 8 <= end, "the hash of page {page} is gone");
                assert!(content == pair.content(page));
            }
            // The end lies before the page's own hash, or before one that is read with it.
            Err(error) => assert!(matches!(error, SourceError::Shrunk { .. }), "{page}: {error}"),
        });
        prop_assert!(source.verify(&mut |_| true).is_err());
        let refused = pair.open();
        prop_assert!(matches!(refused, Err(SourceError::Table { .. })), "{refused:?}");
    }

    #[test]
    fn each_bit_of_the_header_counts(bit in 0..PAGE * 8) {
        let pair = Pair::write(3, &[(1, 1, 7)]);
        flip(&pair.writable(&pair.table), bit);
        let refused = pair.open();
        prop_assert!(matches!(refused, Err(SourceError::Table { .. })), "{refused:?}");
    }
}

#[test]
fn unfinished_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("image"), folder.path().join("table"));
    let mut writer = ImageWriter::create(&image, &table, 8192, [0; 16]).unwrap();
    writer.write(0, &[1; 8192]).unwrap();
    drop(writer);
    let error = HashedImage::open(&image, &table).unwrap_err().to_string();
    assert!(error.contains("unfinished") && !error.contains('\n'), "{error}");
}

#[test]
fn the_files_of_two_images_do_not_fit() {
    let (a, b) = (Pair::write(4, &[(0, 4, 1)]), Pair::write(5, &[(0, 4, 1)]));
    let refused = HashedImage::open(&a.image, &b.table);
    assert!(matches!(refused, Err(SourceError::Table { .. })), "{refused:?}");
    // An image of the same length, but with other content.
    let c = Pair::write(4, &[(0, 4, 2)]);
    let source = HashedImage::open(&a.image, &c.table).unwrap();
    a.only_these_differ(&source, &[0, 1, 2, 3]);
    // The image is not a table, and neither is a file that does not exist.
    assert!(matches!(HashedImage::open(&a.image, &a.image), Err(SourceError::Table { .. })));
    assert!(matches!(HashedImage::open(&a.image, "/nonexistent"), Err(SourceError::Open { .. })));
}

#[test]
fn whole_units_come_checked() {
    // `mapped` returns only bytes that are at hand without waiting, such as those of files in
    // memory.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let pair = Pair::write_in(folder, 1024, &[(0, 1024, 3)]);
    let source = pair.open().unwrap();
    let unit = source.mapped(512 * PAGE, 512 * PAGE).unwrap();
    let copy = tempfile::tempfile().unwrap();
    // SAFETY: only the kernel reads the bytes, and `unit` keeps them alive.
    let written =
        unsafe { libc::write(copy.as_raw_fd(), unit.address().as_ptr().cast(), unit.len()) };
    assert_eq!(written, 2 << 20);
    let mut content = vec![0; 2 << 20];
    copy.read_exact_at(&mut content, 0).unwrap();
    for (page, content) in (512..).zip(content.chunks_exact(PAGE as usize)) {
        assert!(content == pair.content(page), "page {page}");
    }
    assert!(source.mapped(0, 1024 * PAGE).is_none(), "a copy is kept small");
    assert!(source.mapped(2048, PAGE).is_none() && source.mapped(1024 * PAGE, PAGE).is_none());
    flip(&pair.writable(&pair.image), 1000 * PAGE * 8);
    assert!(source.mapped(512 * PAGE, 512 * PAGE).is_none());
    assert!(source.mapped(0, 512 * PAGE).is_some());
}

/// An image of 64 GiB, nearly all hole: neither opening it nor a fault reads the whole table.
#[test]
fn opening_and_holes_are_cheap_at_any_size() {
    const SIZE: u64 = 64 << 30;
    let pair = Pair::write(SIZE / PAGE, &[(SIZE / PAGE - 1, 1, 9)]);
    let begun = std::time::Instant::now();
    let source = pair.open().unwrap();
    assert_eq!(source.extent(4096).unwrap(), Extent::Hole { end: 4096 + (2 << 20) });
    let took = begun.elapsed();
    assert!(took.as_millis() < 100, "{took:?}");
    assert_eq!(pair.fetch(&source, SIZE / PAGE - 1).unwrap(), pair.content(SIZE / PAGE - 1));
}

#[test]
fn the_hash_of_a_table_is_the_pages() {
    let pair = Pair::write(2, &[(1, 1, 9)]);
    let mut hashes = [0; 16];
    pair.writable(&pair.table).read_exact_at(&mut hashes, PAGE).unwrap();
    assert_eq!(hashes[..8], [0; 8]);
    assert_eq!(hashes[8..], page_hash(&pair.content(1)).to_le_bytes());
}
