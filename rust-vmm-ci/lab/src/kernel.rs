// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab's kernels: chooses a version, and finds it in the cache or builds it.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};

use crate::archive::{self, Package, Sources};
use crate::debian::{self, Flavour};
use crate::inputs::{Base, Build, ELF, Inputs};
use crate::modules::Module;
use crate::{cache, compile};

/// Approximate size of a source package, for messages.
const SIZE: &str = "150 MB";

/// The kernel to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice {
    /// One of the lab's own.
    Base(Base),
    /// Debian's, of this system's release, as it is packaged.
    Debian,
    /// An image.
    File(PathBuf),
}

impl Choice {
    /// Returns the path of the image; builds or downloads it first if it is not in the cache.
    pub(crate) fn image(&self, stock: bool) -> Result<PathBuf> {
        match self {
            Self::Base(base) => ensure(Build { base: *base, stock }),
            Self::Debian => debian::ensure(Flavour::Full)?.image(),
            Self::File(path) => Ok(path.clone()),
        }
    }

    /// Returns the modules that the kernel needs in the lab, in load order.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        match self {
            Self::Base(_) | Self::File(_) => Ok(Vec::new()),
            Self::Debian => debian::ensure(Flavour::Full)?.modules(),
        }
    }

    /// Returns the kernel that guests boot: the same, or the default if it is not the lab's own.
    pub(crate) fn for_guests(&self, stock: bool) -> Build {
        match self {
            Self::Base(base) => Build { base: *base, stock },
            Self::Debian | Self::File(_) => Build { base: Base::V6_12, stock: false },
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if let Ok(base) = word.parse() {
            return Ok(Self::Base(base));
        }
        if word == "debian" {
            return Ok(Self::Debian);
        }
        // Otherwise a version that the lab does not have would be looked for as a file.
        if word.contains('/') {
            return Ok(Self::File(word.into()));
        }
        Err("choose 6.12, 7, debian, or the path of an image, with a slash".into())
    }
}

/// Returns the kernel image, and builds it first if necessary. The newest source is the one in this
/// machine's apt lists, or else in the lab's own as they were when it last downloaded something.
/// The network is used only if the image is not in the cache.
pub(crate) fn ensure(build: Build) -> Result<PathBuf> {
    let inputs = Inputs::read(build)?;
    for sources in sources(build.base) {
        if let Some((_, version)) = newest(build.base, sources)? {
            let image = inputs.image(&version)?;
            if image.exists() {
                return Ok(image);
            }
        }
    }
    let _lock = cache::lock()?;
    let base = build.base.name();
    let find = |sources| newest(build.base, sources);
    let fetched = archive::fetch(&format!("linux-source-{base}"), sources(build.base), find);
    let (package, version) = match fetched {
        Ok(fetched) => fetched,
        Err(error) => {
            let Some(cached) = newest_cached(&inputs)? else {
                return Err(error).context(format!("no kernel source of {base} is in the cache"));
            };
            eprintln!(
                "lab: the archive could not be asked for the newest kernel source ({error:#}); taking {}, the newest in the cache",
                cached.1
            );
            cached
        }
    };
    let image = inputs.image(&version)?;
    if !image.exists() {
        let built = compile::build(&package, &version, &inputs)?;
        // The image is installed last, because its presence means that the folder is complete.
        install(&built.elf, &image.with_file_name(ELF))?;
        install(&built.image, &image)?;
    }
    Ok(image)
}

/// Returns the lists that may have the source, in the order in which they are asked.
fn sources(base: Base) -> [Sources; 2] {
    match base {
        Base::V6_12 => [Sources::System, Sources::Neighbours],
        Base::V7 => [Sources::System, Sources::Backports],
    }
}

/// Returns the newest source package in these lists, and its version.
fn newest(base: Base, sources: Sources) -> Result<Option<(Package, String)>> {
    let mut found = Vec::new();
    for name in archive::names(&format!("linux-source-{}", base.name()), sources)? {
        let package = Package { name, size: SIZE };
        if base.has_package(&package.name)
            && let Some(version) = package.newest(sources)?
        {
            found.push((package, version));
        }
    }
    Ok(found.into_iter().max_by(|a, b| compare(&a.1, &b.1)))
}

/// Returns the newest version that is available without the network.
fn newest_cached(inputs: &Inputs) -> Result<Option<(Package, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(archive::folder()?)? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        let Some((name, _)) = file.split_once('_') else { continue };
        if inputs.base.has_package(name) {
            let package = Package { name: name.into(), size: SIZE };
            let versions = package.cached()?;
            found.extend(versions.into_iter().map(|version| (package.clone(), version)));
        }
    }
    for entry in fs::read_dir(cache::folder("kernel")?)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if let Some((version, _)) = name.rsplit_once('-')
            && inputs.folder_name(version) == name
        {
            // The image exists, so the package is not needed.
            let package = Package { name: String::new(), size: SIZE };
            found.push((package, version.to_owned()));
        }
    }
    Ok(found.into_iter().max_by(|a, b| compare(&a.1, &b.1)))
}

/// Compares versions; runs of digits compare by value.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    fn parts(version: &str) -> Vec<(u64, String)> {
        let mut parts = vec![(0, String::new())];
        for c in version.chars() {
            let last = parts.last_mut().expect("never empty");
            match c.to_digit(10) {
                Some(digit) if last.1.is_empty() => last.0 = last.0 * 10 + u64::from(digit),
                Some(digit) => parts.push((digit.into(), String::new())),
                None => last.1.push(c),
            }
        }
        parts
    }
    parts(a).cmp(&parts(b))
}

/// Installs a file atomically.
fn install(built: &Path, image: &Path) -> Result<()> {
    let folder = image.parent().context("an image lies in a folder")?;
    fs::create_dir_all(folder)?;
    let part = folder.join("part");
    fs::copy(built, &part)?;
    fs::rename(&part, image)
        .with_context(|| format!("{} could not be put in its place", image.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_is_by_number() {
        let sorted =
            ["6.12.9-1~deb12u1", "6.12.95-1~deb12u1", "6.12.117-1~deb12u1", "6.12.117-2~deb12u1"];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn kernel_is_a_name_or_a_path() {
        assert_eq!("7".parse(), Ok(Choice::Base(Base::V7)));
        assert_eq!("6.12".parse(), Ok(Choice::Base(Base::V6_12)));
        assert_eq!("debian".parse(), Ok(Choice::Debian));
        assert_eq!("./7".parse(), Ok(Choice::File("./7".into())));
        for wrong in ["", "6", "7.3", "bzImage"] {
            assert!(wrong.parse::<Choice>().is_err(), "{wrong}");
        }
    }
}
