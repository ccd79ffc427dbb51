// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks the round trip of a fault through the service: touch, message, fetch, map, wake.
#![allow(missing_docs)] // criterion's macros create public items.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use demand_memory::{
    BackingKind, FaultPath, Mapping, MemfdBacking, PageRange, Pager, PagerConfig, Retrier, Stats,
    Waiter, to_usize,
};
use demand_uffd::{ArmedMapping, FaultService, Features, Userfaultfd};
use test_support::image::{Near, word_of};

const SIZE: u64 = 8 << 20;

/// Touches all units of new memory; returns the time that this took, and the number of units.
fn touch_all(service: &FaultService, unit: u64) -> (Duration, u64) {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap());
    let retrier = Retrier::new(Default::default(), |failure| panic!("{}", failure.error));
    let stats = Arc::new(Stats::new());
    let pager = Pager::new(PagerConfig {
        stats,
        retrier,
        ..PagerConfig::new(backing, Arc::new(Near(SIZE)))
    })
    .unwrap();
    let mapping = Arc::new(pager.backing().map().unwrap());
    let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
    let armed = if unit > 4096 {
        // As for a back-end: the service does not know that it is this process.
        ArmedMapping::foreign(&uffd, mapping.address().as_ptr() as u64, &pager).unwrap()
    } else {
        ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap()
    };
    if unit == 4096 {
        pager.set_guest_trap(armed.clone()).unwrap();
    }
    service.add(&[armed]).unwrap();
    let begun = Instant::now();
    for offset in (0..SIZE).step_by(to_usize(unit)) {
        assert_eq!(word(&mapping, offset), word_of(offset));
    }
    let elapsed = begun.elapsed();
    // A page is mapped a moment before it counts as present.
    let all = PageRange::new(0, pager.pages());
    pager.ensure(all, FaultPath::Fill, &Waiter::new()).unwrap();
    service.release(&uffd).unwrap();
    (elapsed, SIZE / unit)
}

fn word(mapping: &Mapping, offset: u64) -> u64 {
    // SAFETY: `at` keeps the word within the mapping, and no reference to it exists.
    unsafe { mapping.at(offset).cast::<u64>().as_ptr().read_volatile() }
}

fn fault(criterion: &mut Criterion) {
    if let Err(error) = Userfaultfd::open(Features::GUEST_MEMORY) {
        return println!("SKIPPED: {error}");
    }
    let service = FaultService::start(1).unwrap();
    for (name, unit) in [("4K", 4096), ("a back-end's 2M", 2 << 20)] {
        criterion.bench_function(&format!("demand-uffd: fault of {name}, shmem"), |b| {
            b.iter_custom(|count| {
                let (mut time, mut faults) = (Duration::ZERO, 0);
                while faults < count {
                    let (elapsed, touched) = touch_all(&service, unit);
                    time += elapsed;
                    faults += touched;
                }
                // Only whole memories are measured: scale to the number that was asked for.
                time.mul_f64(count as f64 / faults as f64)
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = fault
}
criterion_main!(benches);
