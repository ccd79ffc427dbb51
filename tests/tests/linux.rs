// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests, snapshotted under load and restored lazily: they prove by themselves that no byte
//! is wrong and no request lost, and their kernels have nothing to complain of.

use anyhow::Result;
use demand_tests::guest::{DiskOption, Guest, GuestConfig, Kernel};
use demand_vmm::api::Go;
use guest_work::{Prove, Work};

/// A folder that disappears with the test, and a disk in it.
fn folder() -> Result<(tempfile::TempDir, DiskOption)> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    Ok((folder, DiskOption::new(disk)))
}

fn work() -> Work {
    Work::Prove(Prove { memory: 16 << 20, beat_ms: 500, ..Prove::default() })
}

/// Boots, snapshots under load, kills everything, restores, and has the guest prove itself.
fn comes_back(
    kernel: &Kernel,
    cpus: u32,
    memory: &str,
    restored: &str,
    more: &[&str],
) -> Result<()> {
    let (folder, disk) = folder()?;
    let at = |name: &str| folder.path().join(name);
    let mut config =
        GuestConfig { cpus, memory: memory.into(), disks: vec![disk], more: Vec::new() };
    let mut guest = Guest::boot(&at("first"), kernel, &work(), &config)?;
    assert_eq!(guest.wait_ready()?, u64::from(cpus));
    let before = guest.wait_beats(3)?;
    guest.snapshot(&at("snapshot"), Some(Go::Pause))?;
    guest.kill();
    config.memory = restored.into();
    config.more = more.iter().map(ToString::to_string).collect();
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &config)?;
    let after = guest.wait_beats(3)?;
    assert!(after.records > before.records && after.mono_us > before.mono_us);
    let (_, records, report) = guest.finish()?;
    assert!(records > before.records);
    assert!(report.guest.faults + report.kvm_internal.faults > 0, "{report:?}");
    Ok(())
}

fn test(kernel: Option<Kernel>, f: impl FnOnce(&Kernel) -> Result<()>) {
    if let Some(kernel) = kernel {
        f(&kernel).unwrap();
    }
}

#[test]
fn the_labs_kernel_comes_back() {
    test(Kernel::lab(), |kernel| comes_back(kernel, 2, "size=192M", "", &[]));
}

#[test]
fn an_elf_kernel_comes_back() {
    test(Kernel::lab_elf(), |kernel| comes_back(kernel, 1, "size=192M", "", &["--engine", "uffd"]));
}

#[test]
fn debians_kernel_comes_back() {
    test(Kernel::debian(), |kernel| comes_back(kernel, 4, "size=384M", "", &[]));
}

#[test]
fn a_guest_comes_back_on_huge_pages() {
    test(Kernel::lab(), |kernel| {
        comes_back(kernel, 2, "size=192M,backing=hugetlb-2m", "", &["--fill", "off"])
    });
}
