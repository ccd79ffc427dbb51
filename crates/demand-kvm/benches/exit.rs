// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks the work of a vCPU's thread at an exit for a missing page, without KVM.
#![allow(missing_docs)] // criterion's macros create public items.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a bench are small")]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use demand_kvm::{FaultHandler, FaultRegion, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use demand_memory::{BackingKind, MemfdBacking, PAGE_SIZE, Pager, PagerConfig, Retrier, Waiter};
use demand_source::LocalFile;
use vm_memory::GuestAddress;

const PAGES: u64 = 256;
const START: u64 = 1 << 30;

fn handle(criterion: &mut Criterion) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&vec![7; (PAGES * PAGE_SIZE) as usize], 0).unwrap();
    let waiter = Waiter::new();
    let make = || {
        let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
        let source = Arc::new(LocalFile::open(image.path()).unwrap());
        let retrier = Retrier::new(Default::default(), |failure| panic!("{}", failure.error));
        let pager =
            Pager::new(PagerConfig { retrier, ..PagerConfig::new(Arc::new(backing), source) });
        FaultHandler::new([FaultRegion::userfault(GuestAddress(START), pager.unwrap())]).unwrap()
    };
    let all = |handler: FaultHandler| {
        for page in 0..PAGES {
            let (gpa, flags) = (START + page * PAGE_SIZE, KVM_MEMORY_EXIT_FLAG_USERFAULT);
            handler.handle(gpa, PAGE_SIZE, flags, &waiter).unwrap();
        }
        handler
    };
    criterion.bench_function(&format!("demand-kvm: handle exits, {PAGES} missing pages"), |b| {
        b.iter_batched(make, all, BatchSize::LargeInput);
    });
    criterion.bench_function(&format!("demand-kvm: handle exits, {PAGES} present pages"), |b| {
        b.iter_batched(|| all(make()), all, BatchSize::LargeInput);
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = handle
}
criterion_main!(benches);
