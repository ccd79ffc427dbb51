// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares a snapshot's memory, byte by byte, with the memory of its VM. A guest verifies only the
//! pages that it uses; this covers all of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const PAGE: usize = 4096;
/// Number of bytes compared at once.
const STEP: usize = 1 << 20;

/// Compares the memory in the directory `snapshot` with that of the VMM's process `vmm`, whose
/// guest has one region and has been paused since the snapshot was started. A populated page must
/// equal the process's, a missing one that in `source`, the directory from which the VM was
/// restored. Pages may arrive meanwhile.
///
/// # Errors
///
/// The first page that differs, or that the process's memory cannot be read.
pub fn same_memory(vmm: u32, snapshot: &Path, source: Option<&Path>) -> Result<()> {
    // The initial state of the bitmap: pages that arrive from now on come from the source, so they
    // are equal in both.
    let mut missing = Vec::new();
    std::io::copy(&mut &one_file(vmm, "missing-bitmap")?, &mut missing)?;
    // Two words for each of the bitmap's: claims, and the populated pages among them.
    let mut claims = Vec::new();
    std::io::copy(&mut &one_file(vmm, "claimed-bitmap")?, &mut claims)?;
    let is_missing = |page: usize| {
        let populated = claims[page / 64 * 16 + 8 + page % 64 / 8];
        missing[page / 8] & !populated & 1 << (page % 8) != 0
    };
    let (memory, first_byte, size) = guest_memory(vmm)?;
    let taken = File::open(snapshot.join("memory")).context("open the snapshot's memory")?;
    ensure!(taken.metadata()?.len() == size, "the snapshot's memory has another size");
    let source = source.map(|source| File::open(source.join("memory"))).transpose()?;
    let [mut now, mut then, mut before] = [(); 3].map(|()| vec![0; STEP]);
    for at in (0..size).step_by(STEP) {
        let length = STEP.min((size - at) as usize);
        memory.read_exact_at(&mut now[..length], first_byte + at)?;
        taken.read_exact_at(&mut then[..length], at)?;
        let first = at as usize / PAGE;
        if (first..first + length / PAGE).any(is_missing) {
            let source = source.as_ref().context("pages are missing, and there is no source")?;
            source.read_exact_at(&mut before[..length], at)?;
        }
        for page in first..first + length / PAGE {
            let bytes = (page - first) * PAGE..(page - first + 1) * PAGE;
            let (what, must) = match is_missing(page) {
                true => ("missing, and differs from the source's", &before),
                false => ("present, and differs from the VM's", &now),
            };
            ensure!(must[bytes.clone()] == then[bytes], "page {page} of the snapshot was {what}");
        }
    }
    Ok(())
}

/// Opens the guest's memory. Returns a file, the offset of the memory in it, and the memory's size.
fn guest_memory(vmm: u32) -> Result<(File, u64, u64)> {
    // A guest_memfd can only be read in a mapping.
    let maps = fs::read_to_string(format!("/proc/{vmm}/maps"))?;
    if let Some(line) = maps.lines().find(|line| line.contains("[kvm-gmem]")) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (from, to) = range.context("no range in /proc/PID/maps")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        return Ok((File::open(format!("/proc/{vmm}/mem"))?, from, to - from));
    }
    let memory = one_file(vmm, "guest-memory")?;
    let size = memory.metadata()?.len();
    Ok((memory, 0, size))
}

/// Opens the only memfd of that name in a process.
fn one_file(process: u32, name: &str) -> Result<File> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let path = entry?.path();
        // Some are closed meanwhile.
        let Ok(target) = fs::read_link(&path) else { continue };
        if target.to_string_lossy().starts_with(&format!("/memfd:{name} ")) {
            found.push(path);
        }
    }
    match &found[..] {
        [path] => File::open(path).with_context(|| format!("open {name} of process {process}")),
        _ => bail!("process {process} has {} memfds called {name}", found.len()),
    }
}
