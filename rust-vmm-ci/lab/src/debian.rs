// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's unmodified kernel for cloud machines: downloads and unpacks it, without installing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::{self, Package, Sources};
use crate::modules::{self, Module};
use crate::{cache, compile, kernel};

/// The metapackage whose newest version depends on the newest kernel.
const NAME: &str = "linux-image-cloud-amd64";
/// Modules that a guest needs, some of which may be built in: ext4 and its checksum are, in Debian
/// 12. That kernel has no driver for VMGENID.
const MODULES: [&str; 6] =
    ["virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "crc32c_generic"];

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
}

impl Kernel {
    /// Returns the path of the kernel's bzImage.
    pub fn image(&self) -> Result<PathBuf> {
        only(&self.folder.join("boot"), "vmlinuz-")
    }

    /// Returns the modules that a guest needs, in load order.
    pub fn modules(&self) -> Result<Vec<Module>> {
        // Since Debian 13 everything is below /usr.
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

/// Returns the kernel, and downloads it first if necessary. The network is used only if the package
/// is not in the cache.
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

/// Returns the newest kernel package in these lists, and its version.
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

/// Unpacks a package completely or not at all, and removes older ones.
fn unpack(package: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(unpacked()?)? {
        fs::remove_dir_all(entry?.path())?;
    }
    let part = unpacked()?.join("part");
    compile::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&part))?;
    fs::rename(&part, folder)
        .with_context(|| format!("{} could not be put in its place", folder.display()))?;
    // The package file is no longer needed.
    fs::remove_file(package).with_context(|| format!("{} could not be removed", package.display()))
}

/// Returns the first entry of a folder whose name starts with `start`; only one is expected.
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
