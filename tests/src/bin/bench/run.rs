// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the programs to measure: the project's and the bare loops.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use demand_memory::BackingKind;
use demand_tests::process::{program, run};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(300);

/// The images that serve as page sources, in a folder of a tmpfs.
pub(crate) struct Images {
    folder: tempfile::TempDir,
}

impl Images {
    pub(crate) fn new() -> Result<Self> {
        // Neither a disk nor the lab's link to the host may affect the measurement.
        let place =
            ["/dev/shm", "/run", "/tmp"].into_iter().find(|place| Path::new(place).is_dir());
        let folder = tempfile::Builder::new()
            .prefix("demand-paging-bench-")
            .tempdir_in(place.context("find a folder for images")?)?;
        Ok(Images { folder })
    }

    /// Creates an image full of data.
    pub(crate) fn full(&self, bytes: u64) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("full-{bytes}"));
        if !path.exists() {
            let mut file = File::create(&path)?;
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for _ in 0..bytes.div_ceil(1 << 20) {
                let mut block = Vec::with_capacity(1 << 20);
                while block.len() < 1 << 20 {
                    // xorshift64
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    block.extend(state.to_le_bytes());
                }
                file.write_all(&block)?;
            }
            file.set_len(bytes)?;
        }
        Ok(path)
    }

    /// Creates an image that is one hole.
    pub(crate) fn sparse(&self, bytes: u64) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("sparse-{bytes}"));
        File::create(&path)?.set_len(bytes)?;
        Ok(path)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Runs a program that must succeed; returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = run(command, LIMIT)?;
    ensure!(
        output.status.success(),
        "{} ended with {}: {}",
        command.get_program().to_string_lossy(),
        output.status,
        output.stderr.trim()
    );
    Ok(output.stdout)
}

/// Runs `demand-vmm` with these arguments and `--json`.
pub(crate) fn vmm<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Value> {
    report_of("demand-vmm", arguments)
}

/// Runs a program of this workspace with these arguments and `--json`.
pub(crate) fn report_of<S: AsRef<OsStr>>(name: &str, arguments: &[S]) -> Result<Value> {
    let text = output(Command::new(program(name)?).args(arguments).arg("--json"))?;
    Ok(serde_json::from_str(&text)?)
}

/// Returns the path of a bare loop, as built by `rust-vmm-ci/bench`.
pub(crate) fn baseline(name: &str) -> Result<PathBuf> {
    let path = program("demand-vmm")?.with_file_name("baseline").join(name);
    if !path.is_file() {
        bail!("find {}: not there; rust-vmm-ci/bench builds it", path.display());
    }
    Ok(path)
}

/// Measures `N` things in each of some rounds, one right after the other. Each comes first equally
/// often.
pub(crate) fn rounds<T: Copy, const N: usize>(
    count: usize,
    mut measure: impl FnMut(usize) -> Result<T>,
) -> Result<Vec<[T; N]>> {
    let mut samples = Vec::with_capacity(count);
    for round in 0..count {
        let mut sample = [None; N];
        for at in 0..N {
            let at = (at + round) % N;
            sample[at] = Some(measure(at)?);
        }
        samples.push(sample.map(|value| value.expect("each was measured")));
    }
    Ok(samples)
}

/// A guest that touches all its memory once.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    pub backing: BackingKind,
    pub mib_per_cpu: u64,
    pub cpus: u64,
    pub image: &'a Path,
}

impl Guest<'_> {
    /// Returns the arguments of `demand-vmm` for it.
    pub(crate) fn arguments(&self, engine: &str) -> Vec<String> {
        let (backing, mib) = (self.backing, self.mib_per_cpu);
        vec![
            "bench".into(),
            format!("--memory=size={mib}M,backing={backing}"),
            format!("--cpus={}", self.cpus),
            format!("--engine={engine}"),
            format!("--source={}", self.image.display()),
        ]
    }

    /// Measures our engine.
    pub(crate) fn ours(&self, engine: &str) -> Result<Time> {
        Time::of(&vmm(&self.arguments(engine))?)
    }

    /// Measures our engine whose service threads spin for at most this time.
    pub(crate) fn ours_spinning(&self, engine: &str, spin: Duration) -> Result<Time> {
        let mut arguments = self.arguments(engine);
        arguments.push(format!("--spin={}", spin.as_micros()));
        Time::of(&vmm(&arguments)?)
    }

    /// Measures a bare loop.
    pub(crate) fn bare(&self, name: &str) -> Result<Time> {
        self.bare_with(name, &[])
    }

    /// Measures a bare loop that never sleeps between faults.
    pub(crate) fn bare_spinning(&self, name: &str) -> Result<Time> {
        self.bare_with(name, &["-s"])
    }

    fn bare_with(&self, name: &str, options: &[&str]) -> Result<Time> {
        let mut command = Command::new(baseline(name)?);
        command.args(options);
        command.arg("-b").arg(bare_backing(self.backing));
        command.arg("-m").arg(self.mib_per_cpu.to_string());
        command.arg("-v").arg(self.cpus.to_string()).arg("-i").arg(self.image);
        Time::of(&serde_json::from_str(&output(&mut command)?)?)
    }
}

/// A guest's run time and the processor time of all threads, in nanoseconds (in the lab: the run
/// time in instructions), and its number of pages.
#[derive(Clone, Copy)]
pub(crate) struct Time {
    time: f64,
    cpu_time: f64,
    pages: f64,
}

impl Time {
    fn of(report: &Value) -> Result<Self> {
        let [time, cpu_time, pages] =
            ["time_ns", "cpu_time_ns", "pages"].map(|name| field(report, name));
        Ok(Time { time: time?, cpu_time: cpu_time?, pages: pages? })
    }

    pub(crate) fn per_page(self) -> f64 {
        self.time / self.pages
    }

    /// Returns the processor time of 1,000 pages, in microseconds.
    pub(crate) fn cpu_per_thousand(self) -> f64 {
        self.cpu_time / self.pages
    }

    /// Returns the cost of each page in excess of those of `less`. The fixed costs of a run, such
    /// as the first use of each page of the program, cancel.
    pub(crate) fn per_further_page(self, less: Time) -> f64 {
        (self.time - less.time) / (self.pages - less.pages)
    }
}

/// Returns the bare loops' name of a backing.
pub(crate) fn bare_backing(backing: BackingKind) -> &'static str {
    if backing == BackingKind::Shmem { "shmem" } else { "hugetlb" }
}

/// Returns a number in a report.
pub(crate) fn field(report: &Value, name: &str) -> Result<f64> {
    report[name].as_f64().with_context(|| format!("a report has no number {name}: {report}"))
}

/// Returns the smallest of `rounds` measurements, because disturbances only add time.
pub(crate) fn least(rounds: u32, mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..rounds {
        least = least.min(measure()?);
    }
    Ok(least)
}

/// Returns the median.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
