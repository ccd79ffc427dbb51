// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nothing that happens before the first instruction depends on the size of memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_kvm::{PlainSlot, open_kvm};
use demand_memory::{Backing, BackingKind, MemfdBacking};
use demand_tests::cannot_run;
use demand_tests::host::{free_units, is_lab, skip};
use demand_tests::process::{program, run};
use demand_vmm::placement::place;
use demand_vmm::report::Report;

const SMALL: u64 = 256 << 20;
const LARGE: u64 = 64 << 30;
const WINDOW: u64 = 8 << 20;

/// Pairs of runs whose medians are compared; where other load has spoiled these, minima of so many
/// more.
const PAIRS: usize = 11;
const MORE_PAIRS: usize = 30;

fn make_image(folder: &Path, size: u64) -> PathBuf {
    let image = folder.join(size.to_string());
    let mut make = Command::new(program("demand-vmm").unwrap());
    make.arg("make-image").arg("--memory").arg(&image);
    make.arg("--size").arg(WINDOW.to_string()).arg("--vm-size").arg(size.to_string());
    assert!(run(&mut make, Duration::from_secs(60)).unwrap().status.success());
    image
}

/// From the process's start to its first instruction, in microseconds.
fn time_to_first_instruction(image: &Path, size: u64, backing: BackingKind) -> u64 {
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.arg("run").arg("--source").arg(image).arg("--json");
    command.arg("--memory").arg(format!("size={size},backing={backing},reserve=off"));
    command.arg("--test-guest").arg(format!("window={WINDOW},touches=1,vmm-touches=0"));
    let output = run(&mut command, Duration::from_secs(120)).unwrap();
    assert!(output.status.success(), "{}", output.stderr);
    let report: Report = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(report.memory_bytes, size);
    report.time_to_first_instruction_us
}

/// What KVM takes, at best, to make memslots of so many bytes, in microseconds. A KVM that has no
/// second stage of translation keeps a word for each page: it is its own, and nobody can help it.
fn time_of_slots(size: u64) -> u64 {
    let once = || {
        let vm = Arc::new(open_kvm().unwrap().create_vm().unwrap());
        let regions = place(size).into_iter().map(|region| {
            let backing = MemfdBacking::new(BackingKind::Shmem, region.size, true).unwrap();
            (region.start, Arc::new(backing.map().unwrap()))
        });
        let regions: Vec<_> = regions.collect();
        let begun = Instant::now();
        let slots = (0..).zip(regions).map(|(number, (start, mapping))| {
            PlainSlot::new(vm.clone(), number, start, mapping, false).unwrap()
        });
        let slots: Vec<_> = slots.collect();
        let took = begun.elapsed().as_micros() as u64;
        drop(slots);
        took
    };
    (0..10).map(|_| once()).min().unwrap()
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

fn no_slower_with_more_memory(backing: BackingKind) {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let (needed, free) = (WINDOW / backing.unit(), free_units(backing));
    if free < needed {
        return skip(&format!("{needed} pages of {backing} are needed, {free} are free"));
    }
    let folder = tempfile::tempdir().unwrap();
    let (small_image, large_image) =
        (make_image(folder.path(), SMALL), make_image(folder.path(), LARGE));
    let kernel = time_of_slots(LARGE).saturating_sub(time_of_slots(SMALL));
    println!("KVM itself takes {kernel} us longer to make memslots of 64G than of 256M");
    // The lab's KVM has a second stage: there nothing is excused.
    let excused = if is_lab() { 0 } else { kernel };
    let allowed = |small: u64| small * 12 / 10 + excused;

    let (mut small, mut large) = (Vec::new(), Vec::new());
    let pairs = |count: usize, small: &mut Vec<u64>, large: &mut Vec<u64>| {
        for _ in 0..count {
            small.push(time_to_first_instruction(&small_image, SMALL, backing));
            large.push(time_to_first_instruction(&large_image, LARGE, backing));
        }
    };
    pairs(PAIRS, &mut small, &mut large);
    let medians = (median(&mut small), median(&mut large));
    println!(
        "{backing}: medians of {PAIRS}: {} us with 256M, {} us with 64G",
        medians.0, medians.1
    );
    if medians.1 <= allowed(medians.0) {
        return;
    }
    pairs(MORE_PAIRS, &mut small, &mut large);
    let (small, large) = (*small.iter().min().unwrap(), *large.iter().min().unwrap());
    println!("{backing}: minima: {small} us with 256M, {large} us with 64G");
    assert!(
        large <= allowed(small),
        "{large} us with 64G, {small} us with 256M, medians {medians:?}"
    );
}

#[test]
fn the_first_instruction_comes_no_later_with_more_memory_shmem() {
    no_slower_with_more_memory(BackingKind::Shmem);
}

#[test]
fn the_first_instruction_comes_no_later_with_more_memory_hugetlb_2m() {
    no_slower_with_more_memory(BackingKind::Hugetlb2M);
}
