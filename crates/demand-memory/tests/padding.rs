// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images whose length is not a multiple of 4096 bytes, and images that are shorter than memory.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![cfg(not(loom))]

use std::sync::Arc;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, Fill, FillRate, MemfdBacking, PAGE_SIZE, PagerConfig,
    PagerError,
};
use demand_source::{
    BlockingSource, Destination, Extent, HashedImage, ImageWriter, LocalFile, PageSource,
    SourceError, Threaded, ZeroPadded,
};
use test_support::wait::until;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of the image: two whole pages and a part of a third.
const END: u64 = 10_001;
/// Bytes of memory for it.
const SIZE: u64 = 12_288;

fn content() -> Vec<u8> {
    (0..END).map(|at| (at % 250) as u8 + 1).collect()
}

struct Blocking;

impl BlockingSource for Blocking {
    fn size(&self) -> u64 {
        END
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: END })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        // A read past the image's end is out of range.
        to.write_at(0, &content()[offset as usize..][..to.len()]);
        Ok(())
    }
}

fn region(source: Arc<dyn PageSource>, size: u64) -> Result<DemandRegion, PagerError> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, size).unwrap());
    DemandRegion::new(GuestAddress(0), PagerConfig::new(backing, source), ())
}

fn sources(folder: &std::path::Path) -> Vec<Arc<dyn PageSource>> {
    let [raw, image, table] = ["raw", "image", "table"].map(|name| folder.join(name));
    std::fs::write(&raw, content()).unwrap();
    let mut writer = ImageWriter::create(&image, &table, END, [1; 16]).unwrap();
    writer.write(0, &content()).unwrap();
    writer.finish().unwrap();
    vec![
        Arc::new(LocalFile::open(raw).unwrap()),
        Arc::new(HashedImage::open(image, table).unwrap()),
        Arc::new(Threaded::new(Blocking, 1).unwrap()),
    ]
}

#[test]
fn rest_of_the_last_page_is_zeros() {
    let disk = tempfile::tempdir().unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut expected = content();
    expected.resize(SIZE as usize, 0);
    for folder in [&disk, &memory] {
        for source in sources(folder.path()) {
            // Page by page, by fill, and by a copy to an image, which leaves the pages missing.
            let regions = [(); 3].map(|()| region(source.clone(), SIZE).unwrap());
            let [pages, filled, copied] =
                regions.map(|region| DemandMemory::new(vec![region]).unwrap());
            let mut read = vec![0xee; SIZE as usize];
            for (page, read) in read.chunks_mut(PAGE_SIZE as usize).enumerate() {
                pages.read_slice(read, GuestAddress(page as u64 * PAGE_SIZE)).unwrap();
            }
            assert!(read == expected);

            let pagers: Vec<_> = filled.pagers().cloned().collect();
            let _fill = Fill::start(pagers.clone(), FillRate::Unlimited).unwrap();
            until("fill is done", || pagers[0].bitmap().is_complete());
            filled.read_slice(&mut read, GuestAddress(0)).unwrap();
            assert!(read == expected);

            let copy = tempfile::tempdir().unwrap();
            let [image, table] = ["image", "table"].map(|name| copy.path().join(name));
            let mut writer = ImageWriter::create(&image, &table, SIZE, [1; 16]).unwrap();
            copied.write_image(&mut writer, &mut |_| true).unwrap();
            writer.finish().unwrap();
            assert!(std::fs::read(image).unwrap() == expected);
        }
    }
}

#[test]
fn longer_memory_needs_a_padded_image() {
    let folder = tempfile::tempdir().unwrap();
    for source in sources(folder.path()) {
        let long = SIZE + PAGE_SIZE;
        let error = region(source.clone(), long).unwrap_err();
        assert!(matches!(error, PagerError::ImageShort { image_size: SIZE, .. }), "{error}");
        let memory =
            DemandMemory::new(vec![region(Arc::new(ZeroPadded::new(source, long)), long).unwrap()])
                .unwrap();
        let mut read = vec![0xee; long as usize];
        memory.read_slice(&mut read, GuestAddress(0)).unwrap();
        assert!(read[..END as usize] == content() && read[END as usize..].iter().all(|b| *b == 0));
    }
}
