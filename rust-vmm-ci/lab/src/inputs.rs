// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The inputs of the lab's kernels, and the names of what is built from them.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::cache;

/// Version of the build procedure; increased when a change of it changes the result.
const RECIPE: &str = "3";
/// The kernel image's name, in the build tree and in the cache.
pub(crate) const IMAGE: &str = "bzImage";
/// Name of the same kernel as an ELF file with a PVH entry and without symbols, for guests.
pub(crate) const ELF: &str = "vmlinux";

/// A series of kernel releases that the lab has patches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    /// 6.12, with long-term support.
    V6_12,
    /// The newest 7.x that Debian has.
    V7,
}

impl Base {
    /// Returns the name as spelled on the command line, in the cache and below `patches`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V7 => "7",
        }
    }

    /// Returns whether a package has the source of one of this series' kernels.
    pub(crate) fn has_package(self, name: &str) -> bool {
        let Some(release) = name.strip_prefix("linux-source-") else { return false };
        match self {
            Self::V6_12 => release == "6.12",
            Self::V7 => {
                release.strip_prefix("7.").is_some_and(|minor| minor.parse::<u16>().is_ok())
            }
        }
    }

    /// Returns whether a package version, such as 6.12.117-1, is of this series.
    pub(crate) fn has_version(self, version: &str) -> bool {
        version.strip_prefix(self.name()).is_some_and(|rest| rest.starts_with('.'))
    }
}

impl FromStr for Base {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        [Self::V6_12, Self::V7].into_iter().find(|base| base.name() == name).ok_or(())
    }
}

/// A kernel that the lab builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Build {
    /// The series of its source.
    pub base: Base,
    /// Whether it is built without any of the lab's patches.
    pub stock: bool,
}

/// The inputs of a build, besides Debian's source.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The series of the source.
    pub base: Base,
    /// Paths of the configuration fragments.
    pub fragments: Vec<PathBuf>,
    /// Paths of the patches, in the order of application.
    pub patches: Vec<PathBuf>,
    digest: Sha256,
}

impl Inputs {
    pub(crate) fn read(build: Build) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("kernel");
        let name = build.base.name();
        let fragments = vec![folder.join("lab.config"), folder.join(format!("{name}.config"))];
        let patches = match build.stock {
            true => Vec::new(),
            false => patches(&folder.join("patches").join(name))?,
        };
        let mut digest = Sha256::new_with_prefix(RECIPE);
        for path in fragments.iter().chain(&patches) {
            let content =
                fs::read(path).with_context(|| format!("{} could not be read", path.display()))?;
            digest.update(content.len().to_le_bytes());
            digest.update(content);
        }
        Ok(Self { base: build.base, fragments, patches, digest })
    }

    /// Returns the name of the cache folder for a kernel built from these inputs and that source
    /// version.
    pub(crate) fn folder_name(&self, version: &str) -> String {
        let digest = self.digest.clone().chain_update(version).finalize();
        let short: String = digest[..6].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{version}-{short}")
    }

    pub(crate) fn image(&self, version: &str) -> Result<PathBuf> {
        Ok(cache::folder("kernel")?.join(self.folder_name(version)).join(IMAGE))
    }
}

/// Returns the patches of all series in a folder: the series in the order of their names, and the
/// patches of each in that of theirs.
fn patches(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(folder)
            .with_context(|| format!("{} could not be read", folder.display()))?;
        let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    };
    let mut patches = Vec::new();
    for series in list(folder)? {
        let files = list(&series)?;
        patches.extend(
            files.into_iter().filter(|file| file.extension().is_some_and(|e| e == "patch")),
        );
    }
    Ok(patches)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: [Build; 2] =
        [Build { base: Base::V6_12, stock: true }, Build { base: Base::V7, stock: true }];

    #[test]
    fn the_name_depends_on_every_input() {
        let name = |version: &str, content: &str| {
            let inputs = Inputs {
                base: Base::V6_12,
                fragments: Vec::new(),
                patches: Vec::new(),
                digest: Sha256::new_with_prefix(content),
            };
            inputs.folder_name(version)
        };
        assert_eq!(name("6.12", "a"), name("6.12", "a"));
        assert_ne!(name("6.12", "a"), name("6.12", "b"));
        assert_ne!(name("6.12", "a"), name("6.13", "a"));
    }

    #[test]
    fn stock_kernels_have_no_patch() {
        for stock in STOCK {
            assert!(Inputs::read(stock).expect("inputs").patches.is_empty());
            let patched = Inputs::read(Build { stock: false, ..stock }).expect("inputs");
            assert!(patched.patches.len() > 1, "{:?}", patched.patches);
            let same = Inputs::read(stock).expect("inputs").folder_name("1");
            assert_ne!(patched.folder_name("1"), same);
        }
    }

    /// Except for those to features that only the newer one has.
    #[test]
    fn patches_are_the_same_on_each_base() {
        const NEWER: &str = "userfault/0009-guest-memfd.patch";
        let names = |base: Base| {
            let inputs = Inputs::read(Build { base, stock: false }).expect("inputs");
            let name = |path: &PathBuf| {
                let series = path.parent().and_then(Path::file_name).expect("a series");
                Path::new(series).join(path.file_name().expect("a patch"))
            };
            inputs.patches.iter().map(name).collect::<Vec<_>>()
        };
        let mut newer = names(Base::V7);
        newer.retain(|name| name != Path::new(NEWER));
        assert_eq!(names(Base::V6_12), newer);
    }

    #[test]
    fn patches_are_as_sent_by_mail() {
        for Build { base, .. } in STOCK {
            for path in Inputs::read(Build { base, stock: false }).expect("inputs").patches {
                let text = fs::read_to_string(&path).expect("a patch");
                let (head, _) = text.split_once("\n---\n").expect("a message and a patch");
                for line in ["From: ", "Subject: [PATCH", "Signed-off-by: "] {
                    assert!(head.contains(&format!("\n{line}")), "{line} in {}", path.display());
                }
            }
        }
    }

    #[test]
    fn packages_and_versions_belong_to_one_base() {
        assert!(Base::V6_12.has_package("linux-source-6.12"));
        assert!(!Base::V6_12.has_package("linux-source-6.1"));
        assert!(Base::V7.has_package("linux-source-7.3"));
        assert!(!Base::V7.has_package("linux-source-7.3-rt"));
        assert!(Base::V7.has_version("7.3.4-1~bpo13+1"));
        assert!(!Base::V6_12.has_version("6.1.172-1"));
        assert!(!Base::V7.has_version("6.12.117-1"));
    }
}
