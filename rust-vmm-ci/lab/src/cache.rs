// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab's cache of downloads and builds, outside the checkout.

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Environment variable that overrides the cache's default location.
const VARIABLE: &str = "DEMAND_PAGING_CACHE";

/// Returns a folder of the cache; creates it if necessary.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let folder = root()?.join(name);
    fs::create_dir_all(&folder).with_context(|| {
        format!(
            "the cache folder {} could not be created: set {VARIABLE} to one that can",
            folder.display()
        )
    })?;
    Ok(folder)
}

fn root() -> Result<PathBuf> {
    if let Some(root) = env::var_os(VARIABLE) {
        return std::path::absolute(root).with_context(|| format!("{VARIABLE} is no path"));
    }
    let base = match env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
        Some(base) if base.is_absolute() => base,
        _ => PathBuf::from(
            env::var_os("HOME")
                .with_context(|| format!("HOME is not set: set {VARIABLE} to a folder"))?,
        )
        .join(".cache"),
    };
    Ok(base.join("demand-paging"))
}

/// Returns the cargo target directory that the lab was built in, for files that belong to this
/// checkout.
pub(crate) fn target() -> Result<PathBuf> {
    // <target>/<profile>/lab
    let program = env::current_exe().context("the lab's own binary could not be found")?;
    let target =
        program.ancestors().nth(2).context("the lab's binary is in no target directory")?;
    Ok(target.to_owned())
}

/// The lock that a process holds while it changes the cache.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "closing it unlocks")] File);

/// Takes the lock; prints a message if another process holds it.
pub(crate) fn lock() -> Result<Lock> {
    let path = folder("")?.join("lock");
    let file =
        File::create(&path).with_context(|| format!("{} could not be opened", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("lab: another process prepares a kernel; waiting for it");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("{} could not be locked", path.display()));
        }
    }
    Ok(Lock(file))
}
