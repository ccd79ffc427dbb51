// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Passes the commit that the program is built from to the compiler, in `DEMAND_VMM_COMMIT`.
//!
//! It depends on the sources only, so the same sources give the same program. A packaged crate
//! holds the commit in a file of cargo's; without that and without git, the commit is unknown.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let commit = packaged().or_else(checked_out).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=DEMAND_VMM_COMMIT={commit}");
}

/// Returns the commit that a packaged crate was made from.
fn packaged() -> Option<String> {
    let text = fs::read_to_string(".cargo_vcs_info.json").ok()?;
    println!("cargo::rerun-if-changed=.cargo_vcs_info.json");
    let sha = text.split_once("\"sha1\"")?.1.split('"').nth(1)?;
    let short = sha.get(..12)?;
    let dirty = if text.contains("\"dirty\": true") { "-dirty" } else { "" };
    sha.bytes().all(|c| c.is_ascii_hexdigit()).then(|| format!("{short}{dirty}"))
}

/// Returns the commit of the checkout that tracks this crate, with `-dirty` if the sources of the
/// program differ from it.
fn checked_out() -> Option<String> {
    // A copy of the crate inside another repository is not that repository's.
    git(&["ls-files", "--error-unmatch", "Cargo.toml"])?;
    let mut watched = vec![git_path("HEAD")?];
    if let Some(branch) = git(&["symbolic-ref", "-q", "HEAD"]) {
        // A packed reference has no file, and gets one with the next commit.
        watched.extend(git_path(&branch).and_then(|path| existing(&path)));
        watched.extend(git_path("packed-refs"));
        watched.extend(git_path("reftable/tables.list"));
    }
    let sources = sources();
    for path in watched.iter().chain(&sources).filter(|path| path.exists()) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let differ = Command::new("git")
        .args(["--no-optional-locks", "diff", "--quiet", "HEAD", "--"])
        .args(&sources)
        .status()
        .ok()?;
    Some(if differ.success() { commit } else { format!("{commit}-dirty") })
}

/// Returns the files and folders that the program is made of.
fn sources() -> Vec<PathBuf> {
    let own = ["build.rs", "src", "Cargo.toml", "../Cargo.toml", "../Cargo.lock"];
    let crates = fs::read_dir("../crates").into_iter().flatten().flatten();
    let of_crates = crates.flat_map(|it| [it.path().join("src"), it.path().join("Cargo.toml")]);
    let mut all: Vec<_> = own.iter().map(PathBuf::from).chain(of_crates).collect();
    all.retain(|path| path.exists());
    // The order of a folder's entries is the file system's.
    all.sort();
    all
}

/// Returns the path of a file of git's, which worktrees keep in other places.
fn git_path(name: &str) -> Option<PathBuf> {
    git(&["rev-parse", "--git-path", name]).map(PathBuf::from)
}

/// Returns the path, or its nearest ancestor that exists.
fn existing(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|path| path.exists()).map(Path::to_owned)
}

/// Returns the line that git prints, if it succeeds. It writes nothing to the repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("--no-optional-locks").args(arguments).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
