// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm bench`, at sizes too small for meaningful figures: the guest's sums and the counts
//! are right, and the report is readable.

use std::fs;
use std::process::Command;
use std::time::Duration;

use demand_kvm::Engine;
use demand_memory::{BackingKind, PAGE_SIZE};
use demand_tests::host::skip;
use demand_tests::process::{program, run};
use demand_tests::{can_run, cannot_run};
use demand_vmm::bench::BenchReport;

fn bench(arguments: &[&str]) -> Result<BenchReport, String> {
    let mut command = Command::new(program("demand-vmm").unwrap());
    let output =
        run(command.arg("bench").args(arguments).arg("--json"), Duration::from_secs(120)).unwrap();
    if output.status.success() {
        Ok(serde_json::from_str(&output.stdout).expect("the report can be read"))
    } else {
        Err(output.stderr)
    }
}

/// Runs an engine on a backing in all orders, for reads and writes, with both kinds of source.
fn engine(engine: Engine, backing: BackingKind) {
    if !can_run(engine, backing, 4 * backing.unit()) {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    let words = (0..8u32 << 18).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes());
    fs::write(image.path(), words.collect::<Vec<_>>()).unwrap();
    let memory = format!("--memory=size=4M,backing={backing}");
    let name = format!("--engine={engine}");
    let source = format!("--source={}", image.path().display());
    for (order, access, source, cpus) in [
        ("sequential", "read", "--source=hot", 1),
        ("random", "read", source.as_str(), 2),
        ("strided", "write", source.as_str(), 2),
        ("random", "write", "--source=hot", 1),
    ] {
        let (order, access) = (format!("--order={order}"), format!("--access={access}"));
        let cpus_option = format!("--cpus={cpus}");
        let report = bench(&[&memory, &name, &order, &access, source, &cpus_option]).unwrap();
        assert!(report.verified);
        assert_eq!((report.engine.as_str(), report.cpus), (engine.name(), cpus));
        let pages = u64::from(cpus) * (4 << 20) / PAGE_SIZE;
        assert_eq!(report.pages, pages);
        // With userfaultfd, a vCPU faults once per unit; a fault can occur twice.
        let unit = if engine.faults_by_unit() { backing.unit() } else { PAGE_SIZE };
        let least = pages * PAGE_SIZE / unit;
        assert!((least..=least + least / 8 + 1).contains(&report.faults), "{report:?}");
        assert_eq!(report.guest.granularity_bytes, unit);
        assert_eq!(report.guest.pages + report.kvm_internal.pages, pages);
        assert_eq!(report.source_reads.bytes, pages * PAGE_SIZE);
        assert!(report.time_ns > 0 && report.ns_per_page > 0.0 && report.pages_per_second > 0.0);
        assert!(report.latency_us.p50 <= report.latency_us.p99);
        assert!(report.time_to_first_instruction_us > 0);
    }
}

#[test]
fn kvm_userfault_on_shmem() {
    engine(Engine::KvmUserfault, BackingKind::Shmem);
}

#[test]
fn kvm_userfault_on_hugetlb_2m() {
    engine(Engine::KvmUserfault, BackingKind::Hugetlb2M);
}

#[test]
fn uffd_on_shmem() {
    engine(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn uffd_poison_on_shmem() {
    engine(Engine::UffdPoison, BackingKind::Shmem);
}

#[test]
fn uffd_poison_on_hugetlb_2m() {
    engine(Engine::UffdPoison, BackingKind::Hugetlb2M);
}

#[test]
fn uffd_on_hugetlb_2m() {
    engine(Engine::Uffd, BackingKind::Hugetlb2M);
}

/// 64 GiB of which a few pages are touched: untouched pages cost nothing.
#[test]
fn untouched_memory_costs_nothing() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(64 << 30).unwrap();
    let source = format!("--source={}", image.path().display());
    let report =
        bench(&["--memory=size=64G,reserve=off", "--pages=600", "--order=strided", &source]);
    let report = report.unwrap();
    assert_eq!((report.pages, report.guest.bytes_fetched), (600, 0), "the image is a hole");
}

#[test]
fn impossible_measurements_are_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(4 << 20).unwrap();
    let source = format!("--source={}", image.path().display());
    for (arguments, word) in [
        (&["--memory=size=8M", &source][..], "the image: it has only"),
        (&["--memory=size=1T,reserve=off"], "exceed"),
        (&["--memory=size=4M", "--pages=1025"], "1024 pages"),
        (&["--memory=size=4M", "--pages=0"], "1024 pages"),
        (&["--memory=size=4M", "--order=backwards"], "strided"),
        (&["--memory=size=4M", "--access=execute"], "read or write"),
        (&["--memory=size=4M", "--source=/nowhere"], "/nowhere"),
    ] {
        let said = bench(arguments).unwrap_err();
        assert!(said.contains(word) && said.trim_end().lines().count() == 1, "{said}");
    }
}
