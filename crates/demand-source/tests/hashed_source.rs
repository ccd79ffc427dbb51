// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images with page hashes, both of sources that answer later: reads return what was written, each
//! piece of the table is read once, and changed or unreadable parts are errors.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod far;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use demand_source::{
    Chunk, Destination, Extent, HashedSource, PageSource, Priority, Request, Retry, SourceError,
    TableError,
};
use far::{Counts, Far, Image, PAGE, SIZE, read, write};

fn open(image: &Image) -> (HashedSource, Arc<Counts>, Arc<Counts>) {
    let ((memory, of_memory), (hashes, of_hashes)) =
        (Far::open(&image.memory), Far::open(&image.hashes));
    (HashedSource::open(memory, hashes, "vm7").unwrap(), of_memory, of_hashes)
}

#[test]
fn reads_return_the_image() {
    let image = write();
    let (source, _, table) = open(&image);
    assert_eq!((source.size(), source.generation()), (SIZE, [5; 16]));
    let end = SIZE as usize;
    for (offset, len) in
        [(0, 1), (4095, 2), (8192, 4096), ((32 << 20) - 5, 10_000), (end - 1, 1), (0, end)]
    {
        let got = read(&source, offset as u64, len).unwrap();
        assert!(got == image.content[offset..offset + len], "{len} bytes at {offset}");
    }
    // The header, and each piece of the table.
    assert_eq!(table.reads.load(Ordering::Acquire), 3);
    let error = read(&source, SIZE - 1, 2).unwrap_err();
    assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
}

#[test]
fn several_ranges_are_one_request() {
    let image = write();
    let (source, ..) = open(&image);
    let mut chunks = Vec::new();
    let mut expected = Vec::new();
    for offset in [(33 << 20) + PAGE, 0, 7 * PAGE] {
        let (destination, bytes) = Destination::owned(vec![0; PAGE as usize]);
        chunks.push(Chunk { offset, destination });
        expected.push((offset, bytes));
    }
    source.submit(Request { priority: Priority::Fill, chunks }).wait().unwrap();
    for (offset, bytes) in expected {
        assert!(bytes.take().unwrap() == image.content[offset as usize..][..PAGE as usize]);
    }
}

#[test]
fn holes_are_known_from_hashes() {
    let image = write();
    let (source, memory, _) = open(&image);
    assert!(source.extent_now(0).is_none());
    assert_eq!(source.extent(100).unwrap(), Extent::Data { end: 2 * PAGE });
    assert_eq!(source.extent_now(2 * PAGE).unwrap().unwrap(), Extent::Hole { end: 3 * PAGE });
    assert_eq!(memory.reads.load(Ordering::Acquire), 0);
    assert!(source.extent(SIZE).is_err());
}

#[test]
fn changed_page_is_refused() {
    let image = write();
    let (source, ..) = open(&image);
    let file = OpenOptions::new().write(true).open(&image.memory).unwrap();
    // One in data, and one in a hole.
    for page in [3, 5] {
        file.write_all_at(&[9], page * PAGE + 77).unwrap();
        let error = read(&source, page * PAGE, 100).unwrap_err();
        let SourceError::Altered { offset, .. } = error else { panic!("{error}") };
        assert_eq!(offset, page * PAGE);
    }
    assert!(read(&source, 4 * PAGE, PAGE as usize).is_ok());
}

#[test]
fn failed_reads_are_repeated() {
    let image = write();
    let (source, memory, table) = open(&image);
    for (counts, words) in [(&table, "page hashes of vm7"), (&memory, "the server is away")] {
        counts.fails.store(true, Ordering::Release);
        let error = read(&source, 0, 4096).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.retry(), Retry::Later);
        counts.fails.store(false, Ordering::Release);
        assert!(read(&source, 0, 4096).is_ok());
    }
}

#[test]
fn raising_reaches_both_sources() {
    let image = write();
    let (source, memory, table) = open(&image);
    source.raise(0, PAGE);
    assert_eq!(memory.raised.load(Ordering::Acquire), 1);
    assert_eq!(table.raised.load(Ordering::Acquire), 1);
}

#[test]
fn foreign_tables_are_refused() {
    let image = write();
    let (memory, _) = Far::open(&image.memory);
    let (hashes, _) = Far::open(&image.hashes);
    let error = HashedSource::open(memory.clone(), memory, "vm7").unwrap_err();
    let SourceError::Table { source, .. } = error else { panic!("{error}") };
    assert_eq!(source, TableError::NotATable);
    let error = HashedSource::open(hashes.clone(), hashes, "vm7").unwrap_err();
    let SourceError::Table { source, .. } = error else { panic!("{error}") };
    assert!(matches!(source, TableError::OtherImage { .. }), "{source}");
}
