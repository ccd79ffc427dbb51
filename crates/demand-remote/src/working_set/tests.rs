// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of working sets in a directory, with the image of a snapshot.

use std::path::Path;
use std::sync::Arc;

use demand_source::{
    Chunk, Destination, Extent, HashedImage, ImageWriter, PageSource, Priority, Request, to_usize,
};

use test_support::wait::until;

use super::layout::{Frame, HEAD_BYTES, Head, decode_table, encode_table};
use super::*;
use crate::Location;
use crate::image::LayoutError;

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const ZERO: u64 = 900;

/// Returns the content of a page, which differs from that of all others; from `ZERO` on, zeros.
fn content(page: u64) -> Vec<u8> {
    if page >= ZERO {
        return vec![0; to_usize(PAGE)];
    }
    (0..PAGE).map(|at| u8::try_from((at / 7 * (page + 1) + page) % 251).unwrap() | 1).collect()
}

struct Snapshot {
    _folder: tempfile::TempDir,
    image: Arc<HashedImage>,
    id: ImageId,
    place: Location,
}

fn snapshot() -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    let (memory, hashes) = (folder.path().join("memory"), folder.path().join("hashes"));
    let mut writer = ImageWriter::create(&memory, &hashes, PAGES * PAGE, [7; 16]).unwrap();
    for page in 0..PAGES {
        writer.write(page * PAGE, &content(page)).unwrap();
    }
    writer.finish().unwrap();
    let image = Arc::new(HashedImage::open(&memory, &hashes).unwrap());
    let id = ImageId::of_generation([7; 16], PAGES * PAGE);
    let place = beside_directory(&Location::Path(folder.path().into()));
    Snapshot { _folder: folder, image, id, place }
}

impl Snapshot {
    fn record(&self, touched: &[u64], before: Option<&WorkingSet>) -> Saved {
        let recording = Recording { image: self.id, source: &*self.image, touched, before };
        record(&self.place, recording, &|| true).unwrap()
    }

    fn open(&self) -> WorkingSet {
        WorkingSet::open(&self.place, self.id).unwrap()
    }

    fn path(&self) -> &Path {
        let Location::Path(path) = &self.place else { panic!("{:?}", self.place) };
        path
    }
}

/// Reads a page as a pager does.
fn read(source: &dyn PageSource, page: u64, priority: Priority) -> Vec<u8> {
    let mut bytes = vec![1; to_usize(PAGE)];
    if source.extent(page * PAGE).unwrap().is_hole() {
        return vec![0; to_usize(PAGE)];
    }
    if let Some(read) = source.read_now(page * PAGE, &mut Destination::from(&mut bytes[..])) {
        read.unwrap();
        return bytes;
    }
    let (destination, bytes) = Destination::owned(vec![0; to_usize(PAGE)]);
    let chunks = vec![Chunk { offset: page * PAGE, destination }];
    source.submit(Request { priority, chunks }).wait().unwrap();
    bytes.take().unwrap()
}

/// An image that answers no read: what is read comes from the working set.
struct Silent(Arc<HashedImage>);

impl PageSource for Silent {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn extent(&self, _: u64) -> Result<Extent, demand_source::SourceError> {
        Ok(Extent::Data { end: self.size() })
    }
    fn submit(&self, _: Request) -> demand_source::Completion {
        demand_source::Completion::ready(Err(demand_source::SourceError::Abandoned))
    }
}

/// Touches in an order that is not that of addresses.
fn touches() -> Vec<u64> {
    (0..200).map(|step| step * 37 % 211).chain([ZERO, ZERO + 1, ZERO + 5, 3]).collect()
}

#[test]
fn replay_needs_no_image() {
    let snapshot = snapshot();
    let touched = touches();
    let saved = snapshot.record(&touched, None);
    assert_eq!((saved.pages, saved.zero_pages), (203, 3));
    let set = snapshot.open();
    assert_eq!((set.pages(), set.runs(), set.size()), (203, 1, saved.bytes));
    assert_eq!(saved.bytes, snapshot.path().metadata().unwrap().len());
    let order: Vec<u64> = set.ranges().flatten().collect();
    assert_eq!(order[..3], [ZERO, ZERO + 1, ZERO + 5], "pages of zeros come first");
    let mut first: Vec<_> = order[3..67].to_vec();
    let mut expected = touched[..64].to_vec();
    first.sort_unstable();
    expected.sort_unstable();
    assert_eq!(first, expected, "the first frame has the pages that were touched first");
    let source = ReplayedSource::new(Arc::new(Silent(snapshot.image.clone())), set);
    for (at, page) in order.into_iter().enumerate() {
        let priority = if at % 5 == 0 { Priority::Demand } else { Priority::Fill };
        assert!(read(&source, page, priority) == content(page), "page {page}");
    }
    let stats = source.stats();
    assert_eq!((stats.frames, stats.failed), (4, 0));
}

#[test]
fn replay_begins_before_any_request() {
    let snapshot = snapshot();
    snapshot.record(&touches(), None);
    let source = ReplayedSource::new(Arc::new(Silent(snapshot.image.clone())), snapshot.open());
    source.begin();
    until("the first frames are there", || source.stats().frames == 4);
    let mut bytes = vec![1; to_usize(PAGE)];
    let read = source.read_now(3 * PAGE, &mut Destination::from(&mut bytes[..]));
    assert!(matches!(read, Some(Ok(()))) && bytes == content(3), "{read:?}");
}

#[test]
fn pages_outside_the_set_come_from_the_image() {
    let snapshot = snapshot();
    snapshot.record(&touches(), None);
    let source = ReplayedSource::new(snapshot.image.clone(), snapshot.open());
    for page in [500, 3, 899, 210, 0, ZERO, ZERO + 2] {
        assert!(read(&source, page, Priority::Demand) == content(page), "page {page}");
    }
    // Ranges that begin in the set and end outside.
    let mut bytes = vec![0; to_usize(300 * PAGE)];
    source.read_through(0, &mut Destination::from(&mut bytes[..])).unwrap();
    assert!(bytes == (0..300).flat_map(content).collect::<Vec<_>>());
}

#[test]
fn damaged_frames_come_from_the_image() {
    let snapshot = snapshot();
    let saved = snapshot.record(&touches(), None);
    let set = snapshot.open();
    let mut bytes = std::fs::read(snapshot.path()).unwrap();
    // The last byte of the object, and one of the first frame.
    let frames = HEAD_BYTES + to_usize(Head::decode(&bytes[..HEAD_BYTES]).unwrap().table_len);
    bytes[frames + 600] ^= 1;
    bytes[to_usize(saved.bytes) - 1] ^= 0x80;
    std::fs::write(snapshot.path(), &bytes).unwrap();
    let source = ReplayedSource::new(snapshot.image.clone(), set);
    for page in touches() {
        let (destination, bytes) = Destination::owned(vec![0; to_usize(PAGE)]);
        let chunks = vec![Chunk { offset: page * PAGE, destination }];
        source.submit(Request { priority: Priority::Fill, chunks }).wait().unwrap();
        assert!(bytes.take().unwrap() == content(page), "page {page}");
    }
    assert_eq!((source.stats().frames, source.stats().failed), (2, 2));
}

#[test]
fn set_that_vanishes_harms_nothing() {
    let snapshot = snapshot();
    snapshot.record(&touches(), None);
    let source = ReplayedSource::new(snapshot.image.clone(), snapshot.open());
    std::fs::remove_file(snapshot.path()).unwrap();
    for page in touches() {
        assert!(read(&source, page, Priority::Fill) == content(page), "page {page}");
    }
}

#[test]
fn sets_of_other_images_are_refused() {
    let snapshot = snapshot();
    let missing = WorkingSet::open(&snapshot.place, snapshot.id).unwrap_err();
    assert!(matches!(missing, WorkingSetError::Missing { .. }), "{missing}");
    snapshot.record(&touches(), None);
    for other in [
        ImageId::of_generation([8; 16], PAGES * PAGE),
        ImageId::of_generation([7; 16], PAGES * PAGE * 2),
        ImageId::of_index(crate::image::ObjectId::of(b"index"), PAGES * PAGE),
    ] {
        let error = WorkingSet::open(&snapshot.place, other).unwrap_err();
        assert!(matches!(error, WorkingSetError::OtherImage { .. }), "{error}");
        assert!(error.to_string().contains("recorded with another image"), "{error}");
    }
    std::fs::write(snapshot.path(), "short").unwrap();
    let error = WorkingSet::open(&snapshot.place, snapshot.id).unwrap_err();
    let short = matches!(error, WorkingSetError::Layout { source: LayoutError::Length { .. }, .. });
    assert!(short, "{error}");
    std::fs::write(snapshot.path(), vec![0; 4096]).unwrap();
    let error = WorkingSet::open(&snapshot.place, snapshot.id).unwrap_err();
    assert!(error.to_string().contains("it is not a working set"), "{error}");
    std::fs::remove_file(snapshot.path()).unwrap();
    std::fs::create_dir(snapshot.path()).unwrap();
    let error = WorkingSet::open(&snapshot.place, snapshot.id).unwrap_err();
    assert!(matches!(error, WorkingSetError::Folder { .. }), "{error}");
}

#[test]
fn runs_are_merged() {
    let snapshot = snapshot();
    snapshot.record(&[1, 2, 3, 4], None);
    let first = snapshot.open();
    snapshot.record(&[5, 2, 1], Some(&first));
    let second = snapshot.open();
    assert_eq!((second.runs(), second.pages()), (2, 5));
    snapshot.record(&[2, 1, 6], Some(&second));
    let third = snapshot.open();
    assert_eq!((third.runs(), third.pages()), (3, 6));
    let seen = |page| third.entries().find(|entry| entry.page == page).unwrap().seen;
    assert_eq!([1, 2, 5, 6].map(seen), [0b111, 0b111, 0b10, 0b1]);
    let source = ReplayedSource::new(snapshot.image.clone(), third);
    assert!(read(&source, 6, Priority::Fill) == content(6));
}

#[test]
fn cancelled_recording_writes_nothing() {
    let snapshot = snapshot();
    let touched = touches();
    let recording =
        Recording { image: snapshot.id, source: &*snapshot.image, touched: &touched, before: None };
    let left = std::cell::Cell::new(2);
    let error = record(&snapshot.place, recording, &|| left.replace(left.get() - 1) > 0);
    assert!(matches!(error, Err(WorkingSetError::Cancelled { .. })), "{error:?}");
    assert!(!snapshot.path().exists());
}

#[test]
fn changed_bits_are_noticed() {
    let snapshot = snapshot();
    snapshot.record(&touches(), None);
    let bytes = std::fs::read(snapshot.path()).unwrap();
    let head = Head::decode(&bytes[..HEAD_BYTES]).unwrap();
    let table = &bytes[HEAD_BYTES..HEAD_BYTES + to_usize(head.table_len)];
    decode_table(&head, table).unwrap();
    for bit in 0..HEAD_BYTES * 8 {
        let mut bytes = bytes[..HEAD_BYTES].to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Head::decode(&bytes).is_err(), "bit {bit}");
    }
    for bit in 0..table.len() * 8 {
        let mut table = table.to_vec();
        table[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_table(&head, &table).is_err(), "bit {bit}");
    }
}

#[test]
fn hostile_tables_are_refused() {
    let entry = |page| super::history::Entry { page, seen: 1, rank: 0 };
    let zeros = |pages: &[u64]| Frame {
        entries: pages.iter().map(|page| entry(*page)).collect(),
        stored: None,
    };
    let image = ImageId::of_generation([7; 16], PAGES * PAGE);
    let decode = |frames: u32, table: &[u8]| {
        let table_len = table.len() as u64;
        let len = HEAD_BYTES as u64 + table_len;
        let table_digest = crate::image::format::digest(table);
        let head = Head { image, runs: 1, frames, table_len, len, table: table_digest };
        decode_table(&Head::decode(&head.encode())?, table)
    };
    let twice = [zeros(&[4, 5]), zeros(&[5])];
    let unseen = [Frame {
        entries: vec![super::history::Entry { page: 1, seen: 0, rank: 0 }],
        stored: None,
    }];
    let most: Vec<u64> = (0..513).collect();
    for (frames, what) in [
        (&twice[..], "which two frames have"),
        (&[zeros(&[PAGES])], "the number of a page"),
        (&[zeros(&[])], "the number of pages of a frame"),
        (&[zeros(&most)], "the number of pages of a frame"),
        (&unseen, "the runs of a page"),
    ] {
        let table = encode_table(frames);
        let error = decode(u32::try_from(frames.len()).unwrap(), &table).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    let good = encode_table(&[zeros(&[4, 5])]);
    assert_eq!(decode(1, &good).unwrap(), [zeros(&[4, 5])]);
    for (frames, table, what) in [
        (1, &good[..good.len() - 1], "the end of the table"),
        (1, &[&good[..], &[0]].concat(), "the rest of the table"),
        (2, &good, "the end of the table"),
        (1, &[7, 1, 0, 1, 0, 1], "the coding of a frame"),
        (1, &[255, 1, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], "a number of the table"),
        (u32::MAX, &good, "the number of frames"),
    ] {
        let error = decode(frames, table).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}
