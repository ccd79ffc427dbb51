// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest faults in the lab, whose clock counts instructions.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use demand_memory::BackingKind;
use demand_tests::process::program;

use crate::run::{Guest, Images, baseline, field, least, output, vmm};
use crate::table::{Row, Target};

const PART: &str = "lab";

/// Memory of a measurement in all, in MiB. What a run costs once, such as the first use of each
/// page of the program, is spread over its pages.
const MIB: u64 = 64;

const ENGINES: [&str; 3] = ["kvm-userfault", "uffd", "kvm-attributes"];
const BACKINGS: [BackingKind; 2] = [BackingKind::Shmem, BackingKind::Hugetlb2M];

/// All rows of the lab, measured where this runs.
pub fn rows() -> Result<Vec<Row>> {
    let images = Images::new()?;
    let image = images.full(MIB << 20)?;
    let guest = |backing, cpus| Guest { backing, mib_per_cpu: MIB / cpus, cpus, image: &image };
    let mut rows = Vec::new();
    let instructions = |name: String, figure| Row::new(PART, name, "instructions/page", figure);

    let mut userfault_on_hugetlb = None;
    for backing in BACKINGS {
        for engine in ENGINES {
            let name = format!("guest fault, {engine}, {backing}");
            let bare = least(2, || guest(backing, 1).bare(engine))?;
            match least(2, || guest(backing, 1).ours(engine)) {
                Ok(ours) => {
                    if (engine, backing) == ("kvm-userfault", BackingKind::Hugetlb2M) {
                        userfault_on_hugetlb = Some(ours);
                    }
                    let row = instructions(name, ours).against("bare loop", bare);
                    rows.push(row.target(Target::AtMostMore(500.0)));
                }
                Err(error) => rows.push(Row::unavailable(PART, name, error)),
            }
        }
    }

    let other = least(2, || guest(BackingKind::Shmem, 1).bare("other-process"))?;
    let content = Content::measure()?;
    if let Some(ours) = userfault_on_hugetlb {
        let name = "guest fault, kvm-userfault, hugetlb-2m, and copy and zeroing";
        rows.push(
            instructions(name.into(), ours)
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

    for backing in BACKINGS {
        let one = least(2, || guest(backing, 1).ours("kvm-userfault"))?;
        for cpus in [2, 8] {
            let many = least(2, || guest(backing, cpus).ours("kvm-userfault"))?;
            let name = format!("kvm-userfault, {backing}, {cpus} vCPUs on disjoint pages");
            let row = instructions(name, many).against("1 vCPU", one);
            rows.push(row.target(Target::RatioAtMost(1.1)));
        }
    }
    for backing in BACKINGS {
        for cpus in [2, 8] {
            rows.extend(calls(&images, &guest(backing, cpus))?);
        }
    }
    rows.extend(restore()?);
    Ok(rows)
}

/// What content costs that is no part of a fault, in instructions a page.
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

/// The system calls of a run, counted by strace.
fn calls(images: &Images, guest: &Guest<'_>) -> Result<Vec<Row>> {
    let log = images.folder().join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=ioctl,futex", "-o"]).arg(&log);
    strace.arg(program("demand-vmm")?).args(guest.arguments("kvm-userfault")).arg("--json");
    let report = serde_json::from_str(&output(&mut strace).context("trace a run")?)?;
    let faults = field(&report, "faults")?;
    let log = fs::read_to_string(&log)?;
    // Each call is begun on one line; "<... ioctl resumed>" is another's end.
    let count = |what: &str| log.lines().filter(|line| line.contains(what)).count() as f64;
    let ioctls = count(" ioctl(") - count(", KVM_RUN");
    let (backing, cpus) = (guest.backing, guest.cpus);
    // On shared memory the page is mapped for KVM's own accesses before it is published.
    let mapping = if backing == BackingKind::Shmem { 1.0 } else { 0.0 };
    let row = |name: &str, calls: f64, limit: f64| {
        let name = format!("{name} a fault, {backing}, {cpus} vCPUs");
        Row::new(PART, name, "calls/fault", calls / faults)
            .target(Target::AtMost(limit))
            .note(&format!("{calls:.0} calls, set-up included, for {faults:.0} faults"))
    };
    Ok(vec![
        row("futex", count(" futex("), 0.01),
        row("ioctls but KVM_RUN", ioctls, mapping + 0.01),
    ])
}

/// From the start of the process to the first instruction, for much memory and little.
fn restore() -> Result<Vec<Row>> {
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
