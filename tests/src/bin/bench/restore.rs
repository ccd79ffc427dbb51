// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The time from the start of the process to the guest's first instruction, on this host.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::run::{Images, baseline, field, median, output, report_of};
use crate::table::{Row, Target};

const PART: &str = "restore";
const ROUNDS: usize = 9;

/// A measurement, in microseconds, for memory of a given size.
type Measure<'a> = dyn Fn(&Sizes) -> Result<f64> + 'a;

/// A size, in the formats that the programs take.
struct Sizes {
    text: &'static str,
    mib: u64,
}

const SMALL: Sizes = Sizes { text: "256M", mib: 256 };
const LARGE: Sizes = Sizes { text: "64G", mib: 64 << 10 };

pub(crate) fn rows() -> Result<Vec<Row>> {
    if let Some(why) = demand_tests::cannot_run() {
        return Ok(vec![Row::unavailable(PART, "first instruction", why)]);
    }
    let images = Images::new()?;
    let image = images.sparse(64 << 30)?;
    let ours = |program: &str, command: &str, more: &[String], size: &Sizes| -> Result<f64> {
        let mut arguments = vec![
            command.to_string(),
            format!("--memory=size={},reserve=off", size.text),
            format!("--source={}", image.display()),
        ];
        arguments.extend_from_slice(more);
        field(&report_of(program, &arguments)?, "time_to_first_instruction_us")
    };
    let nothing = ["--test-guest=touches=0,vmm-touches=0,requests=0,window=64M".to_string()];
    let few = ["--pages=16".to_string()];
    let run = |size: &Sizes| ours("test-vmm", "run", &nothing, size);
    let bench = |size: &Sizes| ours("demand-vmm", "bench", &few, size);
    let slot = |size: &Sizes| slot_time(&image, size);

    let mut rows = vec![compare("64 GiB, test-vmm run", &run, Target::RatioAtMost(1.2))];
    rows.push(compare("64 GiB, demand-vmm bench", &bench, Target::RatioAtMost(1.2)));
    let (bench, slot) = ((medians(&bench)?), (medians(&slot)?));
    rows.push(
        Row::new(PART, "of these, KVM's own for a memslot of 64 GiB", "us", slot.1)
            .against("256 MiB", slot.0)
            .note("one ioctl of a bare loop: what KVM itself sets up for each page"),
    );
    rows.push(
        Row::new(PART, "64 GiB, demand-vmm bench, without KVM's own", "us", bench.1 - slot.1)
            .against("256 MiB", bench.0 - slot.0)
            .target(Target::RatioAtMost(1.2)),
    );
    Ok(rows)
}

/// Returns the medians of both sizes, measured alternately.
fn medians(measure: &Measure<'_>) -> Result<(f64, f64)> {
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        small.push(measure(&SMALL)?);
        large.push(measure(&LARGE)?);
    }
    Ok((median(&mut small), median(&mut large)))
}

fn compare(name: &str, measure: &Measure<'_>, target: Target) -> Row {
    match medians(measure) {
        Ok((small, large)) => {
            Row::new(PART, name, "us", large).against("256 MiB", small).target(target)
        }
        Err(error) => Row::unavailable(PART, name, error),
    }
}

/// Returns the time that KVM takes to create a memslot, in microseconds.
fn slot_time(image: &Path, size: &Sizes) -> Result<f64> {
    let mut command = Command::new(baseline("uffd")?);
    command.arg("-m").arg(size.mib.to_string()).args(["-n", "16"]).arg("-i").arg(image);
    Ok(field(&serde_json::from_str(&output(&mut command)?)?, "slot_ns")? / 1000.0)
}
