// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks with an ext4 file system, created and checked by the system's own programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::succeed;

/// Creates a file system of `size` bytes with the files of the folder `of`.
///
/// # Errors
///
/// If mkfs.ext4 fails, or is not installed.
pub fn make(path: &Path, of: &Path, size: u64) -> Result<()> {
    fs::File::create(path)?.set_len(size)?;
    succeed(Command::new(program("mkfs.ext4")).args(["-q", "-F", "-d"]).arg(of).arg(path))
        .context("make a file system; install e2fsprogs")
}

/// Checks all of an unmounted file system, without changing it.
///
/// # Errors
///
/// If e2fsck finds an error, including a journal that needs replay.
pub fn check(path: &Path) -> Result<()> {
    succeed(Command::new(program("e2fsck")).args(["-f", "-n"]).arg(path))
        .context("check the file system afterwards")
}

/// Returns the path of a program that Debian keeps in folders of root's PATH only.
fn program(name: &str) -> PathBuf {
    let places = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(name));
    places.into_iter().find(|path| path.exists()).unwrap_or_else(|| name.into())
}
