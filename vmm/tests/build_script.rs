// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The build script names the commit that the program is built from, also after the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A repository whose crate `vmm` has the build script, and prints the commit.
struct Repository {
    folder: tempfile::TempDir,
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap().trim().into()
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    run(Command::new("git")
        .args(["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"])
        .args(arguments)
        .current_dir(folder))
}

/// Builds the crate of this checkout and returns the commit that its program prints.
fn built(checkout: &Path) -> String {
    run(Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--offline"])
        .current_dir(checkout.join("vmm"))
        .env("CARGO_TARGET_DIR", checkout.join("target"))
        .env_remove("DEMAND_VMM_COMMIT"))
}

impl Repository {
    /// Returns `None` without git.
    fn new() -> Option<Self> {
        if Command::new("git").arg("--version").output().is_err() {
            test_support::host::skip("there is no git");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a");
        fs::create_dir_all(root.join("vmm/src")).unwrap();
        fs::create_dir_all(root.join("crates/part/src")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs");
        fs::copy(script, root.join("vmm/build.rs")).unwrap();
        for (path, text) in [
            ("vmm/Cargo.toml", "[package]\nname = \"a\"\nedition = \"2024\"\n[workspace]\n"),
            ("vmm/src/main.rs", "fn main() { println!(env!(\"DEMAND_VMM_COMMIT\")); }\n"),
            ("crates/part/src/lib.rs", "// 1\n"),
            ("README.md", "1\n"),
            (".gitignore", "target\nCargo.lock\n"),
        ] {
            fs::write(root.join(path), text).unwrap();
        }
        git(&root, &["init", "--quiet"]);
        git(&root, &["add", "."]);
        git(&root, &["commit", "--quiet", "--message", "1"]);
        Some(Repository { folder })
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("a")
    }

    fn commit(&self, checkout: &str) {
        git(
            &self.folder.path().join(checkout),
            &["commit", "--quiet", "--all", "--allow-empty", "-m", "2"],
        );
    }

    fn head(&self, checkout: &str) -> String {
        git(&self.folder.path().join(checkout), &["rev-parse", "--short=12", "HEAD"])
    }
}

#[test]
fn version_follows_the_commits() {
    let Some(repository) = Repository::new() else { return };
    let root = repository.root();
    assert_eq!(built(&root), repository.head("a"));
    repository.commit("a");
    assert_eq!(built(&root), repository.head("a"));
    // A packed branch has no file until the next commit.
    git(&root, &["pack-refs", "--all"]);
    assert_eq!(built(&root), repository.head("a"));
    repository.commit("a");
    assert_eq!(built(&root), repository.head("a"));
    git(&root, &["checkout", "--quiet", "--detach", "HEAD~1"]);
    assert_eq!(built(&root), repository.head("a"));
    // A worktree has its own HEAD.
    git(&root, &["worktree", "add", "--quiet", "-b", "other", "../b"]);
    let other = repository.folder.path().join("b");
    assert_eq!(built(&other), repository.head("b"));
    repository.commit("b");
    assert_eq!(built(&other), repository.head("b"));
    assert_eq!(built(&root), repository.head("a"));
}

#[test]
fn altered_sources_are_dirty() {
    let Some(repository) = Repository::new() else { return };
    let root = repository.root();
    assert_eq!(built(&root), repository.head("a"));
    fs::write(root.join("README.md"), "2\n").unwrap();
    assert_eq!(built(&root), repository.head("a"));
    fs::write(root.join("crates/part/src/lib.rs"), "// 2\n").unwrap();
    assert_eq!(built(&root), format!("{}-dirty", repository.head("a")));
    repository.commit("a");
    assert_eq!(built(&root), repository.head("a"));
}

#[test]
fn packaged_crate_needs_no_git() {
    let Some(repository) = Repository::new() else { return };
    let root = repository.root();
    fs::remove_dir_all(root.join(".git")).unwrap();
    assert_eq!(built(&root), "unknown");
    let sha = "0123456789abcdef0123456789abcdef01234567";
    let info = format!("{{\"git\": {{\"sha1\": \"{sha}\"}}}}");
    fs::write(root.join("vmm/.cargo_vcs_info.json"), info).unwrap();
    fs::remove_dir_all(root.join("target")).unwrap();
    assert_eq!(built(&root), &sha[..12]);
}
