// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks of a back-end's set-up and of one round trip, with a real back-end in another
//! process.
#![allow(missing_docs)] // criterion's macros generate public items.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Memory;
use common::process::{Process, run_if_asked};
use criterion::{BatchSize, Criterion, criterion_group};
use demand_memory::BackingKind;
use demand_uffd::{FaultService, Features, Userfaultfd};
use demand_vhost::{BackEnd, Options};

fn connect(criterion: &mut Criterion) {
    if let Err(error) = Userfaultfd::open(Features::GUEST_MEMORY) {
        return println!("SKIPPED: {error}");
    }
    let service = Arc::new(FaultService::start(1).unwrap());
    criterion.bench_function("demand-vhost: connect and share missing memory", |b| {
        let set_up = |(process, memory): (Process, Memory)| {
            let mut back_end = BackEnd::connect(&process.socket, Options::default()).unwrap();
            back_end.set_features(back_end.features()).unwrap();
            back_end.share_missing_memory(&memory.memory, &service).unwrap();
            // Returned, so that they are dropped outside the measured time.
            (back_end, process, memory)
        };
        let make = || (Process::start(), Memory::new(BackingKind::Shmem));
        b.iter_batched(make, set_up, BatchSize::PerIteration);
    });
    let process = Process::start();
    let mut back_end = BackEnd::connect(&process.socket, Options::default()).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    criterion.bench_function("demand-vhost: read the configuration", |b| {
        let mut config = [0; 8];
        b.iter(|| back_end.read_config(0, &mut config).unwrap());
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = connect
}

fn main() {
    // This program also runs as the back-end's process.
    run_if_asked();
    benches();
    Criterion::default().configure_from_args().final_summary();
}
