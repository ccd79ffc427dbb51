// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The figures that this host can measure: back-ends, which need no KVM, the VMM's own accesses,
//! and guest faults under the host's KVM.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use demand_memory::BackingKind;
use demand_tests::host::free_units;
use demand_uffd::DEFAULT_SPIN;

use crate::run::{Guest, Images, Time, bare_backing, baseline, median, output, rounds};
use crate::table::{Row, Target};
use crate::{access, back_end};

const PART: &str = "host";
/// Size of memory in one round, in bytes.
const SIZE: u64 = 64 << 20;
const UNIT: u64 = 2 << 20;
const ROUNDS: usize = 16;
/// Number of rounds of guest faults.
const GUEST_ROUNDS: usize = 12;

pub(crate) fn rows() -> Result<Vec<Row>> {
    let images = Images::new()?;
    let image = images.full(SIZE)?;
    let pool = Pool::of(SIZE / UNIT * 2);
    let backing = if pool.is_some() { BackingKind::Hugetlb2M } else { BackingKind::Shmem };
    let without = "cannot reserve huge pages: the host has too few; raise sysctl vm.nr_hugepages \
                   (measured on shared memory)";
    let note = |row: Row| if pool.is_some() { row } else { row.note(without) };

    let mut rows = Vec::new();
    rows.extend(back_ends(backing, &image)?.into_iter().map(note));
    rows.extend(access::rows(backing, SIZE, &image)?.into_iter().map(note));
    rows.extend(guest(&image));
    Ok(rows)
}

/// Measures back-end faults of 2 MiB: ours, the bare loops, and the handler in another process,
/// alternately.
fn back_ends(backing: BackingKind, image: &Path) -> Result<Vec<Row>> {
    let bare = |name: &str, more: &[&str]| -> Result<Command> {
        let mut command = Command::new(baseline(name)?);
        command.arg("-b").arg(bare_backing(backing)).arg("-i").arg(image);
        command.arg("-m").arg((SIZE >> 20).to_string()).arg("-u").arg(UNIT.to_string());
        command.args(more);
        Ok(command)
    };
    let samples = rounds(ROUNDS, |at| {
        let mut command = match at {
            0 => back_end::command(backing, SIZE, UNIT, image)?,
            1 => bare("back-end", &["-c"])?,
            2 => bare("back-end", &[])?,
            _ => bare("back-end-other-process", &[])?,
        };
        let lines = output(&mut command)?;
        let mut times: Vec<_> = lines.lines().filter_map(|line| line.parse().ok()).collect();
        Ok(median(&mut times) / 1000.0)
    })?;
    let name = format!("back-end fault of 2M, p50, {backing}");
    let row = |reference: &str, at: usize| {
        let pairs: Vec<_> =
            samples.iter().map(|sample: &[f64; 4]| (sample[0], sample[at])).collect();
        Row::of_pairs(PART, name.clone(), "us", reference, &pairs)
    };
    Ok(vec![
        row("bare loop: COPY from the mapped image", 1).target(Target::RatioAtMost(1.05)),
        row("handler in another process: COPY from the mapped image", 3)
            .target(Target::RatioAtMost(0.85)),
        row("bare loop: pread, CONTINUE", 2),
    ])
}

/// Measures guest faults at 4K by userfaultfd, which works with any KVM: their times, and the
/// processor time that they cost.
fn guest(image: &Path) -> Vec<Row> {
    let name = "guest fault, uffd, shmem";
    let measure = || -> Result<Vec<Row>> {
        let guest = Guest { backing: BackingKind::Shmem, mib_per_cpu: SIZE >> 20, cpus: 1, image };
        let samples: Vec<[Time; 5]> = rounds(GUEST_ROUNDS, |at| match at {
            0 => guest.ours_spinning("uffd", Duration::ZERO),
            1 => guest.ours_spinning("uffd", DEFAULT_SPIN),
            2 => guest.bare("other-process"),
            3 => guest.bare("uffd"),
            _ => guest.bare_spinning("uffd"),
        })?;
        let row = |unit: &str, value: fn(Time) -> f64, ours: usize, reference: usize| {
            let times = match (ours, unit) {
                (0, "ns/page") => "asleep between faults".to_string(),
                (_, "ns/page") => format!("spinning for {} us", DEFAULT_SPIN.as_micros()),
                (0, _) => "processor time, asleep between faults".into(),
                _ => format!("processor time, spinning for {} us", DEFAULT_SPIN.as_micros()),
            };
            let reference_is = match reference {
                2 => "handler in another process, 4K",
                3 => "bare loop",
                _ => "bare loop that never sleeps",
            };
            let pairs: Vec<_> = samples
                .iter()
                .map(|sample| (value(sample[ours]), value(sample[reference])))
                .collect();
            Row::of_pairs(PART, format!("{name}, {times}"), unit, reference_is, &pairs)
        };
        let (time, cpu) = (Time::per_page, Time::cpu_per_thousand);
        Ok(vec![
            row("ns/page", time, 0, 2).target(Target::RatioAtMost(1.0)),
            row("ns/page", time, 0, 3),
            row("ns/page", time, 1, 2).target(Target::RatioAtMost(0.6)),
            row("ns/page", time, 1, 4),
            row("us/1000 pages", cpu, 0, 2).target(Target::RatioAtMost(1.2)),
            row("us/1000 pages", cpu, 1, 2).note("spins only while a processor is idle"),
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
