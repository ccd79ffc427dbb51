// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Directories that cannot be a cache, and the permissions of those that can.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use demand_remote::{CacheError, CacheErrorKind, HostCache};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::shared::{ROOMY, distinct, files, open, push, read_all};
use crate::support::{Place, check_content};

fn refused(path: &Path) -> CacheError {
    let error = HostCache::open(path, ROOMY).unwrap_err();
    let line = error.to_string();
    println!("{line}");
    assert!(line.starts_with(&format!("cannot use {}", path.display())), "{line}");
    assert!(line.contains("; ") && !line.contains('\n'), "{line}");
    error
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn unsuitable_directories_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("file"), "").unwrap();
    assert!(matches!(refused(&at("file")).kind(), CacheErrorKind::NotADirectory));
    assert!(matches!(refused(&at("missing/cache")).kind(), CacheErrorKind::Access(_)));
    assert!(!at("missing").exists());
    for writable in [0o777, 0o1777, 0o702] {
        fs::create_dir_all(at("open")).unwrap();
        set_mode(&at("open"), writable);
        assert!(matches!(refused(&at("open")).kind(), CacheErrorKind::Writable));
        assert!(!at("open/packs-v1").exists());
    }
    fs::create_dir(at("linked")).unwrap();
    symlink(at("open"), at("linked/packs-v1")).unwrap();
    let error = HostCache::open(at("linked"), ROOMY).unwrap_err();
    assert!(matches!(error.kind(), CacheErrorKind::NotADirectory), "{error}");
    let error = HostCache::open(at("new"), 1000).unwrap_err();
    assert!(matches!(error.kind(), CacheErrorKind::Size { size: 1000, .. }), "{error}");
    assert!(!at("new").exists());
}

#[test]
fn directory_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        let error = HostCache::open("/usr", ROOMY).unwrap_err();
        assert!(matches!(error.kind(), CacheErrorKind::Access(_)), "{error}");
        return;
    }
    // Root may write everywhere but here.
    let error = HostCache::open("/proc/self", ROOMY).unwrap_err();
    assert!(matches!(error.kind(), CacheErrorKind::Access(_)), "{error}");
}

#[test]
fn files_have_the_directory_s_readers() {
    let place = Place::new();
    let content = distinct(2, 50);
    push(&place, "vm", &content);
    let own = place.path("own");
    read_all(&place, "vm", &own, &content);
    assert_eq!((mode(&own), mode(&own.join("packs-v1"))), (0o700, 0o700));
    assert_eq!(mode(&files(&own)[0]), 0o600);
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    set_mode(&shared, 0o2770);
    read_all(&place, "vm", &shared, &content);
    assert_eq!(mode(&shared.join("packs-v1")) & 0o777, 0o770);
    assert_eq!(mode(&files(&shared)[0]), 0o660);
}

#[test]
fn special_files_are_left_alone() {
    let place = Place::new();
    let content = distinct(3, 51);
    push(&place, "vm", &content);
    let cache = place.path("cache");
    read_all(&place, "vm", &cache, &content);
    let file = files(&cache)[0].clone();
    let victim = place.path("victim");
    fs::write(&victim, "not ours").unwrap();
    let kinds: [&dyn Fn(); 5] = [
        &|| symlink(&victim, &file).unwrap(),
        &|| fs::hard_link(&victim, &file).unwrap(),
        &|| mknodat(CWD, &file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap(),
        &|| fs::create_dir(&file).unwrap(),
        // Any user may have written to this one.
        &|| {
            fs::write(&file, "").unwrap();
            set_mode(&file, 0o666);
        },
    ];
    for make in kinds {
        fs::remove_dir(&file).or_else(|_| fs::remove_file(&file)).unwrap();
        make();
        let cache = HostCache::open(&cache, ROOMY).unwrap();
        let image = open(&place, "vm", &cache);
        check_content(&image, &content);
        assert_eq!((cache.stats().misses, cache.stats().written_bytes), (3, 0));
    }
    assert_eq!(fs::read(&victim).unwrap(), b"not ours");
}

#[test]
fn removed_directory_ends_the_cache_only() {
    let place = Place::new();
    let content = distinct(8, 52);
    push(&place, "vm", &content);
    let path = place.path("cache");
    let cache = HostCache::open(&path, ROOMY).unwrap();
    let image = open(&place, "vm", &cache);
    check_content(&image, &content);
    fs::remove_dir_all(&path).unwrap();
    check_content(&image, &content);
    check_content(&image, &content);
    assert!(!path.exists());
}
