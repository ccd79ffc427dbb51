// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Outcomes of trials that are kept in a file. Each test runs in a process by itself, which has
//! found out nothing yet: it starts this program again with the test's name.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::*;
use demand_kvm::{DemandSlot, Engine, EngineChoice, ProbeCache, SlotError, probe_for, scratch_vms};
use demand_memory::{BackingKind, GuestMapping};
use tempfile::TempDir;

/// The variable that names the test's file in the process of the test.
const FILE: &str = "KEPT_PROBE";

/// Starts the test in a process by itself.
fn begin(test: &str, file: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env(FILE, file);
    child.stdout(Stdio::null()).spawn().unwrap()
}

/// Runs the test in a process by itself. In that process, returns the cache.
fn alone(test: &str) -> Option<(ProbeCache, Option<TempDir>)> {
    kvm()?;
    if let Some(file) = std::env::var_os(FILE) {
        return Some((ProbeCache::new(PathBuf::from(file)), None));
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(begin(test, &folder.path().join("probe")).wait().unwrap().success());
    None
}

/// Returns the outcomes that the file has.
fn outcomes(cache: &ProbeCache) -> String {
    let text = fs::read_to_string(cache.path()).unwrap();
    let (_, outcomes) = text.split_once("\nuserfault ").unwrap_or_else(|| panic!("{text}"));
    outcomes.into()
}

const AUTO: EngineChoice = EngineChoice::Auto;

#[test]
fn named_engine_is_tried_alone() {
    let Some((cache, _)) = alone("named_engine_is_tried_alone") else { return };
    let only = EngineChoice::Only;
    assert!(probe_for(only(Engine::Uffd)).kvm.is_ok());
    assert!(cache.probe_for(only(Engine::Uffd)).kvm.is_ok());
    assert_eq!(scratch_vms(), 0, "engine uffd needs no trial");
    assert!(!cache.path().exists(), "nothing was found out");
    for (choice, tried) in [
        (only(Engine::KvmUserfault), Engine::KvmUserfault),
        (only(Engine::KvmAttributes), Engine::KvmAttributes),
        (AUTO, Engine::KvmUserfault),
    ] {
        let before = scratch_vms();
        let kvm = probe_for(choice).kvm.unwrap();
        assert_eq!(scratch_vms(), before + 1, "{choice}");
        let untried = demand_kvm::Trial::Untried;
        assert_eq!(kvm.userfault == untried, tried != Engine::KvmUserfault, "{choice}");
        assert_eq!(kvm.attributes == untried, tried != Engine::KvmAttributes, "{choice}");
        // The outcome is the one of a whole probe.
        let all = demand_kvm::probe().kvm.unwrap();
        assert!(kvm.userfault == untried || kvm.userfault == all.userfault);
        assert!(kvm.userfault == untried || kvm.own_accesses == all.own_accesses);
        assert!(kvm.attributes == untried || kvm.attributes == all.attributes);
    }
}

#[test]
fn kept_outcome_is_not_tried_again() {
    let Some((cache, _)) = alone("kept_outcome_is_not_tried_again") else { return };
    let attributes = EngineChoice::Only(Engine::KvmAttributes);
    let first = cache.probe_for(attributes);
    assert_eq!(scratch_vms(), 1);
    assert_eq!(fs::metadata(cache.path()).unwrap().mode() & 0o777, 0o600);
    for _ in 0..3 {
        assert_eq!(cache.probe_for(attributes), first);
    }
    assert_eq!(scratch_vms(), 1);
    // Another engine's outcome is added.
    let auto = cache.probe_for(AUTO);
    assert_eq!(auto.kvm.as_ref().unwrap().attributes, first.kvm.as_ref().unwrap().attributes);
    assert_eq!(scratch_vms(), 2);
    assert_eq!((cache.probe_for(AUTO), scratch_vms()), (auto.clone(), 2));
    assert_eq!(cache.probe_for(attributes), auto);
    // A whole probe tries everything, and a guest_memfd as well, which no start needs.
    let mut whole = cache.probe();
    whole.kvm.as_mut().unwrap().guest_memfd_userfault = demand_kvm::Trial::Untried;
    assert_eq!(whole, auto);
    assert_eq!(scratch_vms(), 5);
}

#[test]
fn foreign_file_is_ignored_and_replaced() {
    let Some((cache, _)) = alone("foreign_file_is_ignored_and_replaced") else { return };
    let attributes = EngineChoice::Only(Engine::KvmAttributes);
    let right = cache.probe_for(attributes);
    let good = fs::read_to_string(cache.path()).unwrap();
    let path = cache.path();
    // Files of another kernel, boot, load of the module or program; and files that no program has
    // written.
    let line = |begin: &str| good.lines().find(|line| line.starts_with(begin)).unwrap();
    let mut others: Vec<String> = ["demand-kvm ", "program ", "kernel ", "boot ", "kvm "]
        .iter()
        .map(|begin| good.replace(line(begin), &format!("{}x", line(begin))))
        .collect();
    others.push(String::new());
    others.push(good[..good.len() - 1].into());
    others.push(good[..good.len() / 2].into());
    others.push(format!("{good}\n"));
    others.push(good.replace("\nown accesses ", "\nown accesses x"));
    others.push(good.replace("\nown accesses unknown", "\nown accesses stop"));
    others.push(good.replace(line("attributes "), "attributes refused 12"));
    others.push(good.replace(line("attributes "), "attributes untried"));
    others.push(good.repeat(100));
    let is_tried = || {
        let before = scratch_vms();
        assert_eq!(cache.probe_for(attributes), right);
        scratch_vms() > before
    };
    for other in others {
        fs::write(path, &other).unwrap();
        assert!(is_tried(), "{other}");
        assert_eq!(fs::read_to_string(path).unwrap(), good, "it is replaced");
        assert!(!is_tried());
    }
    fs::write(path, [0xff; 100]).unwrap();
    assert!(is_tried() && !is_tried());
    // Files to which others may write.
    fs::set_permissions(path, Permissions::from_mode(0o620)).unwrap();
    assert!(is_tried() && !is_tried(), "its group may write to it");
    // Files of another kind, even with the right content.
    let elsewhere = path.with_file_name("elsewhere");
    fs::rename(path, &elsewhere).unwrap();
    symlink(&elsewhere, path).unwrap();
    assert!(is_tried() && !is_tried(), "it was a link");
    assert!(fs::symlink_metadata(path).unwrap().is_file());
    fs::remove_file(path).unwrap();
    let fifo = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(fifo.success() && is_tried() && !is_tried(), "a FIFO delays nothing");
    // Directories to which others may write.
    let folder = path.parent().unwrap();
    fs::set_permissions(folder, Permissions::from_mode(0o770)).unwrap();
    assert!(is_tried() && is_tried(), "their group may write to the directory");
    fs::set_permissions(folder, Permissions::from_mode(0o700)).unwrap();
    assert!(!is_tried());
    // Files and directories of another user, which only root can make.
    if chown(path, Some(65534), None).is_ok() {
        assert!(is_tried() && !is_tried(), "it was another user's");
        chown(folder, Some(65534), None).unwrap();
        assert!(is_tried() && is_tried(), "the directory is another user's");
        chown(folder, Some(0), None).unwrap();
        assert!(!is_tried());
    }
}

#[test]
fn start_needs_no_place_for_the_file() {
    let Some((cache, _)) = alone("start_needs_no_place_for_the_file") else { return };
    let folder = cache.path().parent().unwrap();
    for path in [folder.join("none/probe"), "/proc/probe".into(), "/".into(), "".into()] {
        let cache = ProbeCache::new(path);
        assert!(cache.probe_for(AUTO).kvm.is_ok());
        assert!(cache.probe().kvm.is_ok());
        assert!(!cache.path().is_file());
    }
}

/// The variable that is set in the process that relies on the file of another.
const WRONG: &str = "WRONG";

/// A file that this user could have forged, or that a bug has left. On a host whose KVM has KVM
/// Userfault, it says too little, which is harmless.
#[test]
fn wrong_outcome_creates_no_memslot() {
    let Some((cache, _)) = alone("wrong_outcome_creates_no_memslot") else { return };
    let Some(wrong) = std::env::var_os(WRONG) else {
        let kvm = cache.probe_for(AUTO).kvm.unwrap();
        let good = fs::read_to_string(cache.path()).unwrap();
        let begin = good.find("userfault ").unwrap();
        let end = good.find("attributes ").unwrap();
        if kvm.own_accesses {
            return;
        }
        for own in ["stop", "pass"] {
            let claim = format!("userfault works\nown accesses {own}\n");
            fs::write(cache.path(), [&good[..begin], &claim, &good[end..]].concat()).unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "wrong_outcome_creates_no_memslot", "--nocapture"]);
            let status = child.env(FILE, cache.path()).env(WRONG, own).status().unwrap();
            assert!(status.success(), "{own}");
        }
        return;
    };
    let kvm = kvm().unwrap();
    let probe = cache.probe_for(AUTO);
    let features = probe.kvm.as_ref().unwrap();
    assert!(features.userfault.works(), "the file is believed at first");
    assert_eq!(features.own_accesses, wrong == "stop");
    let machine = Machine::new(&kvm, Engine::KvmUserfault);
    let pager = file_pager(BackingKind::Shmem, 4);
    let mapping = match wrong == "stop" {
        true => GuestMapping::unarmed(&pager).unwrap(),
        false => guest_mapping(&pager, Engine::KvmUserfault),
    };
    let slot = DemandSlot::new(machine.slot_config(2, mapping, Engine::KvmUserfault));
    let error = slot.unwrap_err();
    assert!(matches!(error, SlotError::Unverified { number: 2 }), "{error}");
    assert!(!cache.path().exists(), "the file is removed");
    let right = cache.probe_for(AUTO);
    assert!(!right.kvm.unwrap().userfault.works());
    assert!(outcomes(&cache).starts_with("refused "));
}

/// In the lab: the file is right, and is confirmed beside.
#[test]
fn right_outcome_is_confirmed_beside() {
    let Some((cache, _)) = alone("right_outcome_is_confirmed_beside") else { return };
    let Some(_) = std::env::var_os(WRONG) else {
        if cache.probe_for(AUTO).kvm.unwrap().userfault.works() {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "right_outcome_is_confirmed_beside", "--nocapture"]);
            assert!(child.env(FILE, cache.path()).env(WRONG, "").status().unwrap().success());
        }
        return;
    };
    let kvm = kvm().unwrap();
    let probe = cache.probe_for(AUTO);
    let machine = Machine::new(&kvm, Engine::KvmUserfault);
    let pager = file_pager(BackingKind::Shmem, 4);
    assert!(probe.traps_own_accesses(Engine::KvmUserfault), "{probe:?}");
    let mapping = GuestMapping::unarmed(&pager).unwrap();
    let _slot = machine.slot_over(mapping, Engine::KvmUserfault);
    assert_eq!(scratch_vms(), 1);
    assert!(outcomes(&cache).starts_with("works\nown accesses stop\n"));
}

#[test]
fn parallel_starts_share_the_file() {
    let Some((cache, _)) = alone("parallel_starts_share_the_file") else { return };
    if std::env::var_os(WRONG).is_some() {
        for turn in 0..20 {
            // Some find the file, some replace it.
            if turn % 5 == 4 {
                assert!(cache.probe().kvm.is_ok());
            }
            assert!(cache.probe_for(AUTO).kvm.is_ok());
        }
        return;
    }
    let start = |_| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "parallel_starts_share_the_file"]).env(FILE, cache.path());
        child.env(WRONG, "").stdout(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<_> = (0..10).map(start).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let files = fs::read_dir(cache.path().parent().unwrap()).unwrap();
    let files: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, ["probe"], "nothing else is left");
    let before = scratch_vms();
    assert!(cache.probe_for(EngineChoice::Only(Engine::KvmAttributes)).kvm.is_ok());
    assert_eq!(scratch_vms(), before, "the file is whole");
}
