// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The figures that this host can measure: back-ends, which need no KVM, the VMM's own accesses,
//! and guest faults under the host's KVM.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use demand_memory::BackingKind;
use demand_tests::host::free_units;

use crate::run::{Guest, Images, bare_backing, baseline, median, output};
use crate::table::{Row, Target};
use crate::{access, back_end};

const PART: &str = "host";
/// Size of memory in one round, in bytes.
const SIZE: u64 = 64 << 20;
const UNIT: u64 = 2 << 20;
const ROUNDS: usize = 9;

pub fn rows() -> Result<Vec<Row>> {
    let images = Images::new()?;
    let image = images.full(SIZE)?;
    let pool = Pool::of(SIZE / UNIT * 2);
    let backing = if pool.is_some() { BackingKind::Hugetlb2M } else { BackingKind::Shmem };
    let without = "no huge pages are to be had here (sysctl vm.nr_hugepages): shared memory";
    let note = |row: Row| if pool.is_some() { row } else { row.note(without) };

    let mut rows = Vec::new();
    rows.extend(back_ends(backing, &image)?.into_iter().map(note));
    rows.extend(access::rows(backing, SIZE, &image)?.into_iter().map(note));
    rows.extend(guest(&image));
    Ok(rows)
}

/// Measures back-end faults of 2 MiB: ours, the bare loop, and the handler in another process,
/// alternately.
fn back_ends(backing: BackingKind, image: &Path) -> Result<Vec<Row>> {
    let bare = |name: &str, more: &[&str]| -> Result<Command> {
        let mut command = Command::new(baseline(name)?);
        command.arg("-b").arg(bare_backing(backing)).arg("-i").arg(image);
        command.arg("-m").arg((SIZE >> 20).to_string()).arg("-u").arg(UNIT.to_string());
        command.args(more);
        Ok(command)
    };
    let mut samples: [Vec<f64>; 4] = Default::default();
    for round in 0..ROUNDS {
        let mut commands = [
            back_end::command(backing, SIZE, UNIT, image)?,
            bare("back-end", &[])?,
            bare("back-end", &["-c"])?,
            bare("back-end-other-process", &[])?,
        ];
        // Each comes first equally often.
        for at in 0..commands.len() {
            let at = (at + round) % commands.len();
            let lines = output(&mut commands[at])?;
            samples[at].extend(lines.lines().filter_map(|line| line.parse::<f64>().ok()));
        }
    }
    let [ours, bare, copy, other] = samples.map(|mut values| median(&mut values) / 1000.0);
    let name = format!("back-end fault of 2M, p50, {backing}");
    let row = |reference_is: &str, reference: f64| {
        Row::new(PART, name.clone(), "us", ours).against(reference_is, reference)
    };
    Ok(vec![
        row("bare loop: pread, CONTINUE", bare).target(Target::RatioAtMost(1.15)),
        row("handler in another process: COPY from the mapped image", other)
            .target(Target::RatioAtMost(0.85)),
        row("bare loop: COPY from the mapped image", copy),
    ])
}

/// Measures guest faults at 4K by userfaultfd, which works with any KVM.
fn guest(image: &Path) -> Vec<Row> {
    let name = "guest fault, uffd, shmem";
    let measure = || -> Result<Vec<Row>> {
        let guest = Guest { backing: BackingKind::Shmem, mib_per_cpu: SIZE >> 20, cpus: 1, image };
        let (mut ours, mut bare, mut other) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..3 {
            ours.push(guest.ours("uffd")?.per_page());
            bare.push(guest.bare("uffd")?.per_page());
            other.push(guest.bare("other-process")?.per_page());
        }
        let row = Row::new(PART, name, "ns/page", median(&mut ours));
        Ok(vec![
            row.clone().against("bare loop", median(&mut bare)),
            row.against("handler in another process, 4K", median(&mut other)),
        ])
    };
    if let Some(why) = demand_tests::cannot_run() {
        return vec![Row::unavailable(PART, name, why)];
    }
    measure().unwrap_or_else(|error| vec![Row::unavailable(PART, name, error)])
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages added to the host's pool during the measurement.
struct Pool(Option<String>);

impl Pool {
    /// Provides at least `pages` free huge pages, if possible.
    fn of(pages: u64) -> Option<Self> {
        if free_units(BackingKind::Hugetlb2M) >= pages {
            return Some(Pool(None));
        }
        let before = fs::read_to_string(POOL).ok()?;
        let count: u64 = before.trim().parse().ok()?;
        fs::write(POOL, (count + pages).to_string()).ok()?;
        let pool = Pool(Some(before));
        (free_units(BackingKind::Hugetlb2M) >= pages).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A moment ago this succeeded.
            let _ = fs::write(POOL, before.trim());
        }
    }
}
