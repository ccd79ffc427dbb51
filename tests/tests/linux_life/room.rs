// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The smallest memory in which a Linux guest boots: slightly less is refused, with the required
//! size.
//!
//! `LINUX_ROOM=all` also tries archives of 150 MiB, which takes a minute (`rust-vmm-ci/soak
//! --snapshots` does so).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use demand_tests::linux_vm::{Guest, Kernel};
use demand_tests::process::{program, run};
use guest_work::Work;

use crate::config;

/// Sizes of archives, in MiB.
const SMALL: usize = 2;
const MIDDLE: usize = 16;
const LARGE: usize = 150;

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let (size, named) = (content.len(), name.len() + 1);
    let fields = [1, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, named, 0];
    archive.extend(b"070701");
    fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Creates the kernel's initramfs, enlarged to this size by an unused file.
fn archive(kernel: &Kernel, folder: &Path, mib: usize) -> Result<PathBuf> {
    let mut bytes = fs::read(&kernel.initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let file = (mib << 20).checked_sub(bytes.len() + 4096).context("the initramfs is larger")?;
    let content: Vec<u8> = (0..file).map(|at| (at * 7 + at / 4096) as u8).collect();
    entry(&mut bytes, "filler", 0o100_644, &content);
    entry(&mut bytes, "TRAILER!!!", 0, &[]);
    let path = folder.join(format!("{mib}.cpio"));
    fs::write(&path, bytes)?;
    Ok(path)
}

/// Returns the refusal of this memory size.
fn refusal(kernel: &Kernel, mib: usize) -> Result<String> {
    let mut command = Command::new(program("demand-vmm")?);
    command.args(["run", "--memory", &format!("size={mib}M"), "--serial", "off"]);
    command.arg("--kernel").arg(&kernel.image).arg("--initramfs").arg(&kernel.initramfs);
    let output = run(&mut command, Duration::from_secs(20))?;
    ensure!(output.status.code() == Some(1), "{mib}M: {}: {}", output.status, output.stderr);
    Ok(output.stderr)
}

/// Boots a kernel with an archive of `mib` MiB in the smallest memory that is not refused.
fn boots_or_is_refused(kernel: &Kernel, mib: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let initramfs = archive(kernel, folder.path(), mib)?;
    let kernel = Kernel { image: kernel.image.clone(), initramfs };
    let refused = refusal(&kernel, 40.max(mib + 20))?;
    let (_, after) = refused.split_once("at least ").context(refused.clone())?;
    let least: usize = after.split_once('M').context("a size")?.0.parse()?;
    let refused = refusal(&kernel, least - 1)?;
    ensure!(refused.contains(&format!("at least {least}M")), "{refused}");
    let config = config(1, &format!("size={least}M"), &[]);
    let mut guest = Guest::boot(&folder.path().join("guest"), &kernel, &Work::Idle, &config)?;
    guest.wait_ready().with_context(|| format!("{mib} MiB in {least}M"))?;
    guest.finish()?;
    println!("an initramfs of {mib} MiB: {least}M of memory");
    Ok(())
}

fn boot_in_the_least_memory(kernel: Option<Kernel>, sizes: &[usize]) {
    let Some(kernel) = kernel else { return };
    let all = std::env::var("LINUX_ROOM").is_ok_and(|which| which == "all");
    let sizes = if all { &[LARGE, MIDDLE, SMALL] } else { sizes };
    for mib in sizes {
        boots_or_is_refused(&kernel, *mib).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

#[test]
fn bzimages_boot_in_the_least_memory() {
    boot_in_the_least_memory(Kernel::lab(), &[MIDDLE, SMALL]);
}

#[test]
fn elf_kernels_boot_in_the_least_memory() {
    boot_in_the_least_memory(Kernel::lab_elf(), &[MIDDLE]);
}
