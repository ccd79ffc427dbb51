// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest faults in the lab, whose clock counts instructions.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use demand_memory::BackingKind;
use demand_tests::process::program;

use crate::run::{Guest, Images, Time, baseline, field, least, output, rounds, vmm};
use crate::table::{Row, Target};

const PART: &str = "lab";

/// Total memory of the two runs, in MiB, from whose difference a page's cost is computed.
const MIB: (u64, u64) = (16, 48);

/// Number of rounds that are measured by the clock.
const TIMED_ROUNDS: usize = 8;

const ENGINES: [&str; 3] = ["kvm-userfault", "uffd", "kvm-attributes"];
/// The engine whose vCPUs exit on released kernels, by the side of the one that it is to beat.
const POISON: &str = "uffd-poison";
const BACKINGS: [BackingKind; 2] = [BackingKind::Shmem, BackingKind::Hugetlb2M];

/// Returns all rows of the lab, measured on this machine.
pub(crate) fn rows() -> Result<Vec<Row>> {
    let images = Images::new()?;
    let image = images.full(MIB.1 << 20)?;
    let guest =
        |backing, cpus, mib| Guest { backing, mib_per_cpu: mib / cpus, cpus, image: &image };
    let ours = |engine: &str, backing, cpus| -> Result<f64> {
        let less = guest(backing, cpus, MIB.0).ours(engine)?;
        Ok(guest(backing, cpus, MIB.1).ours(engine)?.per_further_page(less))
    };
    let bare = |name: &str, backing| -> Result<f64> {
        let less = guest(backing, 1, MIB.0).bare(name)?;
        Ok(guest(backing, 1, MIB.1).bare(name)?.per_further_page(less))
    };
    let instructions = |name: String, figure| Row::new(PART, name, "instructions/page", figure);

    let mut rows = Vec::new();
    let (mut by_userfault, mut by_uffd) = (Vec::new(), Vec::new());
    for backing in BACKINGS {
        for engine in ENGINES {
            let name = format!("guest fault, {engine}, {backing}");
            eprintln!("  {name}");
            match ours(engine, backing, 1) {
                Ok(ours) => {
                    if engine == "kvm-userfault" {
                        by_userfault.push((backing, ours));
                    } else if engine == "uffd" {
                        by_uffd.push((backing, ours));
                    }
                    let row = instructions(name, ours).against("bare loop", bare(engine, backing)?);
                    rows.push(row.target(Target::AtMostMore(500.0)));
                }
                Err(error) => rows.push(Row::unavailable(PART, name, error)),
            }
        }
    }

    for (backing, uffd) in by_uffd {
        let name = format!("guest fault, {POISON}, {backing}");
        eprintln!("  {name}");
        let row = instructions(name, ours(POISON, backing, 1)?).against("uffd", uffd);
        rows.push(match backing {
            BackingKind::Shmem => row.target(Target::RatioAtMost(0.8)),
            _ => row,
        });
    }
    rows.extend(marker_calls(&images, &guest(BackingKind::Shmem, 2, 16))?);

    eprintln!("  handler in another process");
    let other = bare("other-process", BackingKind::Shmem)?;
    let content = Content::measure()?;
    if let Some((_, ours)) = by_userfault.iter().find(|(kind, _)| *kind != BackingKind::Shmem) {
        let name = "guest fault, kvm-userfault, hugetlb-2m, and copy and zeroing";
        rows.push(
            instructions(name.into(), *ours)
                .against("handler in another process, 4K, and copy", other)
                .note("a repeated string instruction counts once for each byte"),
        );
        let (ours, other) = (ours - content.copy - content.zero, other - content.copy);
        rows.push(
            instructions("guest fault, kvm-userfault, hugetlb-2m, alone".into(), ours)
                .against("handler in another process, 4K, alone", other)
                .target(Target::RatioAtMost(0.5))
                .note(&format!(
                    "without {:.0} of the copy on both sides and {:.0} of zeroing on ours",
                    content.copy, content.zero
                )),
        );
    }

    for (backing, one) in by_userfault {
        for cpus in [2, 8] {
            let name = format!("kvm-userfault, {backing}, {cpus} vCPUs on disjoint pages");
            eprintln!("  {name}");
            let row = instructions(name, ours("kvm-userfault", backing, cpus)?);
            rows.push(row.against("1 vCPU", one).target(Target::RatioAtMost(1.1)));
            rows.extend(calls(&images, &guest(backing, cpus, 16))?);
        }
    }
    rows.extend(restore()?);
    Ok(rows)
}

/// Returns the rows that are measured by the clock, for whose threads the lab has two processors.
pub(crate) fn timed_rows() -> Result<Vec<Row>> {
    let images = Images::new()?;
    let image = images.full(MIB.0 << 20)?;
    let guest = Guest { backing: BackingKind::Shmem, mib_per_cpu: MIB.0, cpus: 1, image: &image };
    eprintln!("  guest fault, {POISON}, by the clock");
    let samples: Vec<[Time; 2]> = rounds(TIMED_ROUNDS, |at| guest.ours([POISON, "uffd"][at]))?;
    let pairs: Vec<_> =
        samples.iter().map(|[poison, uffd]| (poison.per_page(), uffd.per_page())).collect();
    let name = format!("guest fault, {POISON}, shmem, by the clock");
    let row = Row::of_pairs(PART, name, "ns/page", "uffd", &pairs);
    Ok(vec![row.target(Target::RatioAtMost(0.5)).note("emulated processors")])
}

/// The cost of content that is not part of a fault, in instructions per page.
struct Content {
    copy: f64,
    zero: f64,
}

impl Content {
    fn measure() -> Result<Self> {
        let report = serde_json::from_str(&output(&mut Command::new(baseline("content")?))?)?;
        let least = |name| field(&report, name);
        Ok(Content { copy: least("copy")?, zero: least("zero")? })
    }
}

/// Counts the calls that faults at markers should not make.
fn marker_calls(images: &Images, guest: &Guest<'_>) -> Result<Vec<Row>> {
    let all = Calls::count(images, guest, POISON, &[])?;
    let few = Calls::count(images, guest, POISON, &["--pages=1"])?;
    let faults = all.faults - few.faults;
    let row = |name: &str, calls: f64| {
        Row::new(PART, format!("{name} a fault, {POISON}"), "calls/fault", calls / faults)
            .target(Target::AtMost(0.01))
            .note(&format!("{calls:.0} more calls for {faults:.0} more faults"))
    };
    Ok(vec![
        row("futex", all.futexes - few.futexes),
        row("read of a userfaultfd", all.messages - few.messages),
    ])
}

/// Counts the system calls of faults with strace. Those of a run in which each vCPU touches one
/// page are subtracted, to exclude the set-up.
fn calls(images: &Images, guest: &Guest<'_>) -> Result<Vec<Row>> {
    let all = Calls::count(images, guest, "kvm-userfault", &[])?;
    let few = Calls::count(images, guest, "kvm-userfault", &["--pages=1"])?;
    let faults = all.faults - few.faults;
    let (backing, cpus) = (guest.backing, guest.cpus);
    // On shared memory the page is mapped for KVM's own accesses before it is published.
    let mapping = if backing == BackingKind::Shmem { 1.0 } else { 0.0 };
    let row = |name: &str, calls: f64, limit: f64| {
        let name = format!("{name} a fault, {backing}, {cpus} vCPUs");
        Row::new(PART, name, "calls/fault", calls / faults)
            .target(Target::AtMost(limit))
            .note(&format!("{calls:.0} more calls for {faults:.0} more faults"))
    };
    Ok(vec![
        row("futex", all.futexes - few.futexes, 0.01),
        row("ioctls but KVM_RUN", all.ioctls - few.ioctls, mapping + 0.01),
    ])
}

/// Counts by strace.
struct Calls {
    futexes: f64,
    /// All except `KVM_RUN`.
    ioctls: f64,
    /// Reads of userfaultfds.
    messages: f64,
    faults: f64,
}

impl Calls {
    fn count(images: &Images, guest: &Guest<'_>, engine: &str, more: &[&str]) -> Result<Self> {
        let log = images.folder().join("strace");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-y", "-e", "trace=ioctl,futex,read,preadv2", "-o"]).arg(&log);
        strace.arg(program("demand-vmm")?).args(guest.arguments(engine));
        let report = output(strace.args(more).arg("--json")).context("trace a run")?;
        let faults = field(&serde_json::from_str(&report)?, "faults")?;
        let log = fs::read_to_string(&log)?;
        // Each call begins on one line; "<... ioctl resumed>" marks its end on another.
        let count = |what: &str| log.lines().filter(|line| line.contains(what)).count() as f64;
        let ioctls = count(" ioctl(") - count(", KVM_RUN");
        let read = |line: &str| line.contains(" read(") || line.contains(" preadv2(");
        let reads = |line: &&str| read(line) && line.contains("[userfaultfd]");
        let messages = log.lines().filter(reads).count() as f64;
        Ok(Calls { futexes: count(" futex("), ioctls, messages, faults })
    }
}

/// Measures the time from the start of the process to the first instruction, for much memory and
/// little.
fn restore() -> Result<Vec<Row>> {
    eprintln!("  first instruction");
    let images = Images::new()?;
    let image = images.sparse(64 << 30)?;
    let mut rows = Vec::new();
    for backing in BACKINGS {
        let first = |size: &str| -> Result<f64> {
            let report = vmm(&[
                "bench",
                &format!("--memory=size={size},backing={backing},reserve=off"),
                "--pages=16",
                &format!("--source={}", image.display()),
            ])?;
            Ok(field(&report, "time_to_first_instruction_us")? / 1000.0)
        };
        let (small, large) = (least(3, || first("256M"))?, least(3, || first("64G"))?);
        rows.push(
            Row::new(
                PART,
                format!("first instruction, 64 GiB of {backing}"),
                "million instr.",
                large,
            )
            .against("256 MiB", small)
            .target(Target::RatioAtMost(1.2)),
        );
    }
    Ok(rows)
}
