// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backings and sources that do not do what they say: safe code of others must not reach memory
//! that it was not given, and no page may count as present that was not filled.
#![cfg(not(loom))]

use std::fs::File;
use std::sync::Arc;

use demand_memory::{
    Backing, BackingError, BackingKind, DemandRegion, Mapping, MemfdBacking, PAGE_SIZE, PageRange,
    Pager, PagerError, RegionConfig, Retrier, RetryPolicy, Stats,
};
use demand_source::PageSource;
use test_support::image::Near;
use vm_memory::GuestAddress;

const PAGES: u64 = 64;
const SIZE: u64 = PAGES * PAGE_SIZE;

fn backing() -> MemfdBacking {
    MemfdBacking::new(BackingKind::Shmem, SIZE, true).unwrap()
}

fn config(backing: impl Backing + 'static, source: impl PageSource + 'static) -> RegionConfig {
    RegionConfig {
        start: GuestAddress(0),
        backing: Arc::new(backing),
        source: Arc::new(source),
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    }
}

/// A backing whose mapping is shorter than it says.
#[derive(Debug)]
struct Short(MemfdBacking);

impl Backing for Short {
    fn kind(&self) -> BackingKind {
        self.0.kind()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn map(&self) -> Result<Mapping, BackingError> {
        let file = self.0.file().expect("it is a file");
        Ok(Mapping::shared(file, SIZE - 1, false).unwrap())
    }
    fn allocate(&self, pages: PageRange) -> Result<(), BackingError> {
        self.0.allocate(pages)
    }
    fn file(&self) -> Option<&Arc<File>> {
        self.0.file()
    }
}

#[test]
fn a_mapping_shorter_than_its_backing_is_refused() {
    let expected = |error: PagerError| {
        let short = PagerError::MappingShort { size: SIZE, mapped: SIZE - 1 };
        assert_eq!(error.to_string(), short.to_string());
    };
    expected(DemandRegion::<()>::new(config(Short(backing()), Near(SIZE)), ()).unwrap_err());
    expected(Pager::present(Arc::new(Short(backing())), Arc::new(Stats::new())).unwrap_err());
}

#[test]
fn memory_past_the_last_address_is_refused() {
    let at = |start| {
        let config = config(backing(), Near(SIZE));
        DemandRegion::<()>::new(RegionConfig { start: GuestAddress(start), ..config }, ())
    };
    assert!(matches!(at(u64::MAX - SIZE + 2), Err(PagerError::PastTheEnd { size: SIZE, .. })));
    at(u64::MAX - SIZE + 1).unwrap();
}
