// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The Linux guests that tests boot: kernels, and for each an initramfs with this workspace's
//! `guest-work` as its first program. They are prepared on the host, because inside the lab the
//! host's files are read-only and there is no network.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::cpio::{Archive, DIRECTORY, PROGRAM};
use crate::debian::{self, Flavour};
use crate::inputs::{self, Build};
use crate::modules::{self, Module};
use crate::{cache, initramfs};

/// Environment variables for the paths of the lab's kernel, in both formats, and its initramfs.
const LAB: [&str; 3] = ["LAB_GUEST_BZIMAGE", "LAB_GUEST_VMLINUX", "LAB_GUEST_INITRAMFS"];
/// Environment variables for the paths of Debian's kernel and its initramfs.
const DEBIAN: [&str; 2] = ["LAB_GUEST_DEBIAN_BZIMAGE", "LAB_GUEST_DEBIAN_INITRAMFS"];

const PROGRAM_NAME: &str = "guest-work";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The set of guests to prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guests {
    /// No guests.
    No,
    /// The lab's kernel, which exists anyway.
    Lab,
    /// The lab's kernel and Debian's.
    All,
}

impl Guests {
    /// Returns the value as spelled on the command line and in the environment.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Lab => "lab",
            Self::All => "all",
        }
    }

    fn variables(self) -> Vec<&'static str> {
        match self {
            Self::No => Vec::new(),
            Self::Lab => LAB.into(),
            Self::All => [&LAB[..], &DEBIAN].concat(),
        }
    }
}

impl FromStr for Guests {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "" | "0" | "no" => Ok(Self::No),
            "lab" => Ok(Self::Lab),
            "1" | "all" => Ok(Self::All),
            _ => Err("choose lab, all or no".into()),
        }
    }
}

/// Prepares the guests and returns the variables with their values. Returns nothing if all the
/// variables are already set, because then another process has prepared the guests.
pub(crate) fn prepare(wanted: Guests, kernel: Build) -> Result<Vec<(&'static str, PathBuf)>> {
    let variables = wanted.variables();
    if variables.iter().all(|name| env::var_os(name).is_some()) {
        return Ok(Vec::new());
    }
    let image = crate::kernel::ensure(kernel)?;
    let debian = (wanted == Guests::All).then(|| debian::ensure(Flavour::Cloud)).transpose()?;
    let folder = cache::target()?.join("guests");
    fs::create_dir_all(&folder)
        .with_context(|| format!("{} could not be created", folder.display()))?;
    let program = build(&folder)?;
    let elf = image.with_file_name(inputs::ELF);
    let mut values = vec![image, elf, put(&folder.join("lab.cpio"), &pack(&program, &[]))?];
    if let Some(debian) = debian {
        values.push(debian.image()?);
        values.push(put(&folder.join("debian.cpio"), &pack(&program, &debian.modules()?))?);
    }
    Ok(variables.into_iter().zip(values).collect())
}

/// Builds the program as a static binary, because the initramfs has no shared libraries.
fn build(folder: &Path) -> Result<Vec<u8>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .args(["build", "--quiet", "--release", "--package", PROGRAM_NAME, "--target", TARGET])
        .arg("--manifest-path")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        // A separate target directory, because the flags differ: builds with other flags would
        // otherwise invalidate each other.
        .arg("--target-dir")
        .arg(folder)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .status()
        .with_context(|| format!("{} could not be run", cargo.display()))?;
    ensure!(status.success(), "{PROGRAM_NAME}, the guests' program, could not be built");
    let path = folder.join(TARGET).join("release").join(PROGRAM_NAME);
    let program =
        fs::read(&path).with_context(|| format!("{} could not be read", path.display()))?;
    ensure!(
        !initramfs::asks_for_loader(&program),
        "{} needs shared libraries, which an initramfs has not",
        path.display()
    );
    Ok(program)
}

/// Returns an initramfs with the program and the modules, in the layout that the program expects.
fn pack(program: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "mnt"] {
        archive.entry(folder, DIRECTORY, &[]);
    }
    archive.entry("init", PROGRAM, program);
    modules::add(&mut archive, modules);
    archive.finish()
}

/// Writes a file atomically. A file that already has this content is left alone, because a guest
/// may be reading it.
fn put(path: &Path, content: &[u8]) -> Result<PathBuf> {
    if !fs::read(path).is_ok_and(|old| old == content) {
        let part = path.with_extension(format!("part-{}", std::process::id()));
        fs::write(&part, content)
            .and_then(|()| fs::rename(&part, path))
            .with_context(|| format!("{} could not be written", path.display()))?;
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_listed_in_their_order() {
        let module = |name: &str| Module { name: name.into(), content: b"ELF".to_vec() };
        let bytes = pack(b"program", &[module("b"), module("a")]);
        let has = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
        assert!(has(b"b.ko\na.ko\n"));
        assert!(has(b"modules/a.ko\0"));
        assert!(!pack(b"program", &[]).windows(7).any(|part| part == b"modules"));
    }
}
