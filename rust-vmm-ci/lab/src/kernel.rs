// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab's kernel: chooses its version, and finds it in the cache or builds it.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::archive::{self, Package, Sources};
use crate::{cache, compile};

/// Version of the build procedure; increased when a change of it changes the result.
const RECIPE: &str = "2";
/// The kernel image's name, in the build tree and in the cache.
pub const IMAGE: &str = "bzImage";
/// Name of the same kernel as an ELF file with a PVH entry and without symbols, for guests.
pub const ELF: &str = "vmlinux";

/// Name of the package with the kernel's source, and of the folder in it.
pub const SOURCE: &str = "linux-source-6.12";

fn source() -> Package {
    Package { name: SOURCE.into(), size: "150 MB" }
}

/// The inputs of the build, besides Debian's source.
#[derive(Debug)]
pub struct Inputs {
    /// Path of the configuration fragment.
    pub fragment: PathBuf,
    /// Paths of the patches, in the order of application.
    pub patches: Vec<PathBuf>,
    digest: Sha256,
}

impl Inputs {
    fn read() -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("kernel");
        let fragment = folder.join("lab.config");
        let mut patches = Vec::new();
        let names = folder.join("patches");
        for entry in fs::read_dir(&names)
            .with_context(|| format!("{} could not be read", names.display()))?
        {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "patch") {
                patches.push(path);
            }
        }
        patches.sort();
        let mut digest = Sha256::new_with_prefix(RECIPE);
        for path in std::iter::once(&fragment).chain(&patches) {
            let content =
                fs::read(path).with_context(|| format!("{} could not be read", path.display()))?;
            digest.update(content.len().to_le_bytes());
            digest.update(content);
        }
        Ok(Self { fragment, patches, digest })
    }

    /// Returns the name of the cache folder for a kernel built from these inputs and that source
    /// version.
    fn folder_name(&self, version: &str) -> String {
        let digest = self.digest.clone().chain_update(version).finalize();
        let short: String = digest[..6].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{version}-{short}")
    }

    fn image(&self, version: &str) -> Result<PathBuf> {
        Ok(cache::folder("kernel")?.join(self.folder_name(version)).join(IMAGE))
    }
}

/// Returns the kernel image, and builds it first if necessary. The newest source is the one in this
/// machine's apt lists; the network is used only if the package is not in the cache.
pub fn ensure() -> Result<PathBuf> {
    let inputs = Inputs::read()?;
    if let Some(version) = source().newest(Sources::System)? {
        let image = inputs.image(&version)?;
        if image.exists() {
            return Ok(image);
        }
    }
    let _lock = cache::lock()?;
    let version = match fetch() {
        Ok(version) => version,
        Err(error) => {
            let Some(version) = newest_cached(&inputs)? else {
                return Err(error).context("no kernel source is in the cache");
            };
            eprintln!(
                "lab: the archive could not be asked for the newest kernel source ({error:#}); taking {version}, the newest in the cache"
            );
            version
        }
    };
    let image = inputs.image(&version)?;
    if !image.exists() {
        let built = compile::build(&version, &source().file(&version)?, &inputs)?;
        // The image is installed last, because its presence means that the folder is complete.
        install(&built.elf, &image.with_file_name(ELF))?;
        install(&built.image, &image)?;
    }
    Ok(image)
}

/// Downloads the newest source package to the cache, unless it is there; returns its version.
fn fetch() -> Result<String> {
    let find = |sources| Ok(source().newest(sources)?.map(|version| (source(), version)));
    Ok(archive::fetch(SOURCE, find)?.1)
}

/// Returns the newest version that is available without the network.
fn newest_cached(inputs: &Inputs) -> Result<Option<String>> {
    let mut versions = source().cached()?;
    for entry in fs::read_dir(cache::folder("kernel")?)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if let Some((version, _)) = name.rsplit_once('-')
            && inputs.folder_name(version) == name
        {
            versions.push(version.to_owned());
        }
    }
    Ok(versions.into_iter().max_by(|a, b| compare(a, b)))
}

/// Compares versions; runs of digits compare by value.
pub fn compare(a: &str, b: &str) -> Ordering {
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
    fn the_name_depends_on_every_input() {
        let name = |version: &str, content: &str| {
            let inputs = Inputs {
                fragment: PathBuf::new(),
                patches: Vec::new(),
                digest: Sha256::new_with_prefix(content),
            };
            inputs.folder_name(version)
        };
        assert_eq!(name("6.12", "a"), name("6.12", "a"));
        assert_ne!(name("6.12", "a"), name("6.12", "b"));
        assert_ne!(name("6.12", "a"), name("6.13", "a"));
    }
}
