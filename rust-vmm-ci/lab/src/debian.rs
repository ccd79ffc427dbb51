// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernel for cloud machines, as it is: fetched and unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::{self, Package, Sources};
use crate::modules::{self, Module};
use crate::{cache, compile, kernel};

/// The package whose newest version depends on the newest kernel.
const NAME: &str = "linux-image-cloud-amd64";
/// What a guest needs beside what may be built in; ext4 and its checksum are, in
/// Debian 12. That kernel has no driver for the VM generation's id.
const MODULES: [&str; 6] =
    ["virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "crc32c_generic"];

/// The kernel, unpacked.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
}

impl Kernel {
    /// Its bzImage.
    pub fn image(&self) -> Result<PathBuf> {
        only(&self.folder.join("boot"), "vmlinuz-")
    }

    /// The modules that a guest needs, in the order in which they are to be loaded.
    pub fn modules(&self) -> Result<Vec<Module>> {
        // From Debian 13 on everything is below /usr.
        let place = ["lib/modules", "usr/lib/modules"]
            .map(|place| self.folder.join(place))
            .into_iter()
            .find(|place| place.is_dir())
            .with_context(|| format!("{} has no modules", self.folder.display()))?;
        let folder = only(&place, "")?;
        modules::pick(&folder, &MODULES)
            .with_context(|| format!("modules of {}", self.folder.display()))
    }
}

/// Returns the kernel, fetched first if need be; the network is asked only for a package
/// that is not in the cache.
pub fn ensure() -> Result<Kernel> {
    if let Some((package, version)) = newest(Sources::System)? {
        let folder = folder(&package, &version)?;
        if folder.exists() {
            return Ok(Kernel { folder });
        }
    }
    let _lock = cache::lock()?;
    match archive::fetch(NAME, newest) {
        Ok((package, version)) => {
            let folder = folder(&package, &version)?;
            if !folder.exists() {
                unpack(&package.file(&version)?, &folder)?;
            }
            Ok(Kernel { folder })
        }
        Err(error) => {
            let Some(folder) = newest_cached()? else {
                return Err(error).context("none of Debian's kernels is in the cache");
            };
            eprintln!(
                "lab: the archive could not be asked for the newest of Debian's kernels ({error:#}); taking {}, the newest in the cache",
                folder.display()
            );
            Ok(Kernel { folder })
        }
    }
}

/// The newest kernel that those lists know.
fn newest(sources: Sources) -> Result<Option<(Package, String)>> {
    let Some(name) = archive::meant_by(NAME, sources)? else {
        return Ok(None);
    };
    let package = Package { name, size: "30 MB" };
    Ok(package.newest(sources)?.map(|version| (package, version)))
}

fn unpacked() -> Result<PathBuf> {
    cache::folder("debian")
}

fn folder(package: &Package, version: &str) -> Result<PathBuf> {
    Ok(unpacked()?.join(format!("{}_{version}", package.name)))
}

fn newest_cached() -> Result<Option<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(unpacked()?)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("linux-image-") {
            names.push(name);
        }
    }
    let newest = names.into_iter().max_by(|a, b| kernel::compare(a, b));
    newest.map(|name| Ok(unpacked()?.join(name))).transpose()
}

/// Unpacks a package, whole or not at all, and removes older ones.
fn unpack(package: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(unpacked()?)? {
        fs::remove_dir_all(entry?.path())?;
    }
    let part = unpacked()?.join("part");
    compile::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&part))?;
    fs::rename(&part, folder)
        .with_context(|| format!("{} could not be put in its place", folder.display()))?;
    // What is in it is there.
    fs::remove_file(package).with_context(|| format!("{} could not be removed", package.display()))
}

/// The only entry of a folder whose name starts so.
fn only(folder: &Path, start: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("{} could not be read", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(start) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} has nothing that is called {start}...", folder.display())
}
