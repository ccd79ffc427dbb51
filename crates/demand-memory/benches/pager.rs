// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks of the steps that make a page present, and of an access to present pages.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a bench are small")]
#![allow(missing_docs)] // criterion's macros make public items.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, MemfdBacking, MissingBitmap, PAGE_SIZE,
    PageRange, PagerConfig, Retrier, Stats, Waiter,
};
use demand_source::LocalFile;
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 256;

fn bitmap(criterion: &mut Criterion) {
    // Returned, so that its drop is not measured.
    let per_page = |bitmap: MissingBitmap, publish: bool| {
        for page in 0..PAGES {
            assert_eq!(bitmap.claim(PageRange::page(page)).len(), 1);
            if publish {
                bitmap.publish(PageRange::page(page));
            }
        }
        bitmap
    };
    for (what, publish) in [("claim", false), ("claim and publish", true)] {
        criterion.bench_function(&format!("demand-memory: {what}, {PAGES} pages"), |b| {
            let make = || MissingBitmap::new(PAGES).unwrap();
            b.iter_batched(make, |bitmap| per_page(bitmap, publish), BatchSize::LargeInput);
        });
    }
}

fn memory(image: &std::path::Path) -> DemandMemory {
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let config = PagerConfig {
        backing: Arc::new(backing),
        source: Arc::new(LocalFile::open(image).unwrap()),
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(Default::default(), |failure| panic!("{}", failure.error)),
    };
    DemandMemory::new(vec![DemandRegion::new(GuestAddress(0), config, ()).unwrap()]).unwrap()
}

fn pages(criterion: &mut Criterion) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&vec![7; (PAGES * PAGE_SIZE) as usize], 0).unwrap();
    let waiter = Waiter::new();
    criterion.bench_function(&format!("demand-memory: ensure, {PAGES} missing pages"), |b| {
        let ensure = |memory: DemandMemory| {
            let pager = memory.pagers().next().unwrap();
            for page in 0..PAGES {
                pager.ensure(PageRange::page(page), FaultPath::Guest, &waiter).unwrap();
            }
            memory
        };
        b.iter_batched(|| memory(image.path()), ensure, BatchSize::LargeInput);
    });
    let present = memory(image.path());
    present.read_slice(&mut vec![0; (PAGES * PAGE_SIZE) as usize], GuestAddress(0)).unwrap();
    let mut page = 0;
    let mut next = || {
        page = (page + 7) % PAGES;
        GuestAddress(page * PAGE_SIZE)
    };
    criterion.bench_function("demand-memory: read 8 bytes that are present", |b| {
        b.iter(|| present.read_obj::<u64>(next()).unwrap());
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = bitmap, pages
}
criterion_main!(benches);
