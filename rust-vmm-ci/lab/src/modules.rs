// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel modules of an unpacked package. The package is not installed, so there is no modules.dep;
//! each module itself contains the list of its dependencies.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cpio::{Archive, DIRECTORY, PROGRAM};

/// A kernel module, ready for an initramfs.
#[derive(Debug)]
pub(crate) struct Module {
    /// The module's name, with underscores.
    pub name: String,
    /// The content of the module's file, decompressed.
    pub content: Vec<u8>,
}

/// Returns these modules and all their dependencies, in load order. Modules that are built into the
/// kernel are omitted.
pub(crate) fn pick(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    find(&folder.join("kernel"), &mut files)?;
    let list = folder.join("modules.builtin");
    let builtin = fs::read_to_string(&list)
        .with_context(|| format!("{} could not be read", list.display()))?;
    let builtin: Vec<String> = builtin.lines().filter_map(|line| name_of(line.as_ref())).collect();
    let mut picked = Vec::new();
    for name in wanted {
        pick_one(name, &files, &builtin, &mut picked)?;
    }
    Ok(picked)
}

fn pick_one(
    name: &str,
    files: &HashMap<String, PathBuf>,
    builtin: &[String],
    picked: &mut Vec<Module>,
) -> Result<()> {
    if picked.iter().any(|module| module.name == name) || builtin.iter().any(|b| b == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else {
        bail!("the kernel has no {name}, neither built in nor as a module");
    };
    let content = read(path)?;
    for needed in depends(&content) {
        pick_one(&needed, files, builtin, picked)?;
    }
    picked.push(Module { name: name.to_owned(), content });
    Ok(())
}

/// Adds modules to an initramfs, and the file /modules/order with their files' names in load order.
/// Without modules nothing is added.
pub(crate) fn add(archive: &mut Archive, modules: &[Module]) {
    if modules.is_empty() {
        return;
    }
    archive.entry("modules", DIRECTORY, &[]);
    let mut order = String::new();
    for module in modules {
        let name = format!("{}.ko", module.name);
        archive.entry(&format!("modules/{name}"), PROGRAM, &module.content);
        order += &name;
        order.push('\n');
    }
    archive.entry("modules/order", PROGRAM, order.as_bytes());
}

/// Finds all modules in a folder and its subfolders, by name.
fn find(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("modules could not be read in {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// Returns the name of the module in a file, or `None` if the file is not a module. File names may
/// contain dashes where module names contain underscores.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// Returns the content of a module, decompressed, so that any kernel can load it.
fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|kind| kind != "xz") {
        return fs::read(path).with_context(|| format!("{} could not be read", path.display()));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("xz could not be run (rust-vmm-ci/setup installs it)")?;
    ensure!(output.status.success(), "{} could not be decompressed", path.display());
    Ok(output.stdout)
}

/// Returns the dependencies of a module, from `depends=a,b` in its `.modinfo` strings.
fn depends(content: &[u8]) -> Vec<String> {
    const START: &[u8] = b"\0depends=";
    let Some(at) = content.windows(START.len()).position(|bytes| bytes == START) else {
        return Vec::new();
    };
    let rest = &content[at + START.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_their_dependencies() {
        let folder = tempfile::tempdir().expect("a folder");
        let drivers = folder.path().join("kernel/drivers");
        fs::create_dir_all(&drivers).expect("made");
        for (file, depends) in [("a-b.ko", "c,d"), ("c.ko", ""), ("d.ko", "c,e"), ("other.ko", "")]
        {
            fs::write(drivers.join(file), format!("ELF\0license=GPL\0depends={depends}\0name=x\0"))
                .expect("written");
        }
        fs::write(folder.path().join("modules.builtin"), "kernel/lib/e.ko\n").expect("written");
        let picked = pick(folder.path(), &["a_b", "e", "c"]).expect("all there");
        let names: Vec<_> = picked.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["c", "d", "a_b"]);
        let error = pick(folder.path(), &["f"]).expect_err("it is not there");
        assert!(error.to_string().contains("has no f,"), "{error}");
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        let name = |path: &str| name_of(path.as_ref());
        assert_eq!(name("kernel/char/virtio-rng.ko.xz").as_deref(), Some("virtio_rng"));
        assert_eq!(name("modules.order"), None);
    }
}
