// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The place of the file in which a start keeps what it has found out about KVM.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use demand_kvm::ProbeCache;

/// The directory of the project's files, in that of the user.
const FOLDER: &str = "demand-paging";

/// Returns the file in which starts of this program keep the outcomes of trying KVM's engines;
/// `None` if this user has no place for it, in which case each start tries them.
pub fn kept_probes() -> Option<ProbeCache> {
    let program = env::current_exe().ok()?;
    let mut name = OsString::from("probe.");
    name.push(program.file_name()?);
    let bases = bases(rustix::process::geteuid().is_root(), |name| env::var_os(name));
    let folder = bases.iter().find_map(|base| folder_in(base))?;
    Some(ProbeCache::new(folder.join(name)))
}

/// Returns the directories in which the project's may lie, in order of preference. Those that are
/// emptied at a boot come first.
fn bases(is_root: bool, variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let named = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    let run = is_root.then(|| PathBuf::from("/run"));
    named("XDG_RUNTIME_DIR").into_iter().chain(run).chain(cache()).collect()
}

/// Returns the project's directory in `base`, which is created if need be. A directory of another
/// user, such as the one that `sudo` leaves in the environment, is left alone.
fn folder_in(base: &Path) -> Option<PathBuf> {
    let me = rustix::process::geteuid().as_raw();
    fs::metadata(base).ok().filter(|base| base.is_dir() && base.uid() == me)?;
    let folder = base.join(FOLDER);
    // It may exist, which is then checked.
    let _ = DirBuilder::new().mode(0o700).create(&folder);
    let found = fs::symlink_metadata(&folder).ok()?;
    let is_ours = found.is_dir() && found.uid() == me && found.mode() & 0o022 == 0;
    is_ours.then_some(folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn places_come_in_order() {
        let all = |name: &str| Some(OsString::from(format!("/{name}")));
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(bases(false, all), paths(&["/XDG_RUNTIME_DIR", "/XDG_CACHE_HOME"]));
        assert_eq!(bases(true, all), paths(&["/XDG_RUNTIME_DIR", "/run", "/XDG_CACHE_HOME"]));
        let home = |name: &str| (name == "HOME").then(|| "/home/me".into());
        assert_eq!(bases(false, home), paths(&["/home/me/.cache"]));
        let relative = |_: &str| Some("here".into());
        assert_eq!(bases(false, relative), paths(&[]));
        assert_eq!(bases(true, |_| None), paths(&["/run"]));
    }

    #[test]
    fn only_own_directories_are_used() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join(FOLDER);
        assert_eq!(folder_in(base.path()), Some(folder.clone()));
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(folder_in(base.path()), Some(folder.clone()), "it exists already");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(folder_in(base.path()), None, "its group may write to it");
        fs::remove_dir(&folder).unwrap();
        symlink("/tmp", &folder).unwrap();
        assert_eq!(folder_in(base.path()), None, "it lies elsewhere");
        assert_eq!(folder_in(&base.path().join("none")), None);
        // A base of another user, in which nothing is created.
        if !rustix::process::geteuid().is_root() {
            assert_eq!(folder_in(Path::new("/")), None);
        }
    }
}
