// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's unmodified kernels: downloads and unpacks them, without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::{self, Package, Sources};
use crate::modules::{self, Module};
use crate::{cache, compile, kernel};

/// A kernel of Debian's, by its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// The kernel for cloud machines, which guests boot.
    Cloud,
    /// The kernel for all machines, which the lab can boot: the other one has no 9p.
    Full,
}

impl Flavour {
    /// Returns the metapackage whose newest version depends on the newest kernel.
    fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Full => "linux-image-amd64",
        }
    }

    /// Returns the approximate download size, for messages.
    fn size(self) -> &'static str {
        match self {
            Self::Cloud => "30 MB",
            Self::Full => "70 MB",
        }
    }

    /// Returns whether an unpacked package is of this flavour, by its folder's name.
    fn has(self, folder: &str) -> bool {
        let package = folder.split('_').next().unwrap_or_default();
        package.starts_with("linux-image-")
            && package.ends_with("-cloud-amd64") == (self == Self::Cloud)
    }

    /// Returns the modules that are needed, some of which may be built in: ext4 and its checksum
    /// are in the cloud kernel of Debian 12, which has no driver for VMGENID.
    fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Cloud => {
                &["virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "crc32c_generic"]
            }
            Self::Full => &[
                // To boot.
                "virtio_pci",
                "virtio_console",
                "9pnet_virtio",
                "9p",
                "overlay",
                // For tests.
                "kvm_amd",
                "crc32c_generic",
                "ext4",
                "fuse",
                "loop",
                "tun",
                "veth",
                "sch_netem",
                "vhost_net",
                "vhost_vsock",
                "vsock_loopback",
            ],
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    folder: PathBuf,
    flavour: Flavour,
}

impl Kernel {
    /// Returns the path of the kernel's bzImage.
    pub(crate) fn image(&self) -> Result<PathBuf> {
        only(&self.folder.join("boot"), "vmlinuz-")
    }

    /// Returns the modules that are needed, in load order.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        // Since Debian 13 everything is below /usr.
        let place = ["lib/modules", "usr/lib/modules"]
            .map(|place| self.folder.join(place))
            .into_iter()
            .find(|place| place.is_dir())
            .with_context(|| format!("{} has no modules", self.folder.display()))?;
        let folder = only(&place, "")?;
        modules::pick(&folder, self.flavour.modules())
            .with_context(|| format!("modules of {}", self.folder.display()))
    }
}

/// Returns the kernel, and downloads it first if necessary. The network is used only if the package
/// is not in the cache.
pub(crate) fn ensure(flavour: Flavour) -> Result<Kernel> {
    let newest = |sources| newest(flavour, sources);
    if let Some((package, version)) = newest(Sources::System)? {
        let folder = folder(&package, &version)?;
        if folder.exists() {
            return Ok(Kernel { folder, flavour });
        }
    }
    let _lock = cache::lock()?;
    let lists = [Sources::System, Sources::Neighbours];
    match archive::fetch(flavour.metapackage(), lists, newest) {
        Ok((package, version)) => {
            let folder = folder(&package, &version)?;
            if !folder.exists() {
                unpack(flavour, &package.file(&version)?, &folder)?;
            }
            Ok(Kernel { folder, flavour })
        }
        Err(error) => {
            let Some(folder) = newest_cached(flavour)? else {
                return Err(error).context("none of Debian's kernels is in the cache");
            };
            eprintln!(
                "lab: the archive could not be asked for the newest of Debian's kernels ({error:#}); taking {}, the newest in the cache",
                folder.display()
            );
            Ok(Kernel { folder, flavour })
        }
    }
}

/// Returns the newest kernel package in these lists, and its version.
fn newest(flavour: Flavour, sources: Sources) -> Result<Option<(Package, String)>> {
    let Some(name) = archive::meant_by(flavour.metapackage(), sources)? else {
        return Ok(None);
    };
    let package = Package { name, size: flavour.size() };
    Ok(package.newest(sources)?.map(|version| (package, version)))
}

fn unpacked() -> Result<PathBuf> {
    cache::folder("debian")
}

fn folder(package: &Package, version: &str) -> Result<PathBuf> {
    Ok(unpacked()?.join(format!("{}_{version}", package.name)))
}

fn newest_cached(flavour: Flavour) -> Result<Option<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(unpacked()?)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if flavour.has(&name) {
            names.push(name);
        }
    }
    let newest = names.into_iter().max_by(|a, b| kernel::compare(a, b));
    newest.map(|name| Ok(unpacked()?.join(name))).transpose()
}

/// Unpacks a package completely or not at all, and removes older ones of its flavour.
fn unpack(flavour: Flavour, package: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(unpacked()?)? {
        let entry = entry?;
        let name = entry.file_name();
        if flavour.has(&name.to_string_lossy()) || name == "part" {
            fs::remove_dir_all(entry.path())?;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flavour_is_in_the_folders_name() {
        let cloud = "linux-image-6.1.0-48-cloud-amd64_6.1.172-1";
        let full = "linux-image-6.1.0-48-amd64_6.1.172-1";
        assert!(Flavour::Cloud.has(cloud) && !Flavour::Full.has(cloud));
        assert!(Flavour::Full.has(full) && !Flavour::Cloud.has(full));
        assert!(!Flavour::Full.has("part"));
    }
}
