// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Objects are removed when no snapshot names them, and not before.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use demand_remote::image::{DEFAULT_GRACE, GcOptions, gc, verify};

use crate::support::{Place, Random, mixed, records};

const NOW: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

fn set(place: &Place) -> BTreeSet<PathBuf> {
    place.objects().into_iter().collect()
}

#[test]
fn only_orphans_are_removed() {
    let place = Place::new();
    let mut content = mixed(4 << 20, 50);
    place.push("first", &content, |push| push).unwrap();
    let first = set(&place);
    records(&mut content[..1 << 20], &mut Random::new(51));
    place.push("second", &content, |push| push.parent("first")).unwrap();
    let both = set(&place);
    // Neither an orphan of an interrupted push nor a foreign file is named by a snapshot.
    let orphan = format!("packs/{}", "0123456789abcdef".repeat(4));
    let foreign = place.path("store/packs/README");
    fs::write(place.path("store").join(&orphan), "x").unwrap();
    fs::write(&foreign, "x").unwrap();

    let kept = gc(&place.store, GcOptions::default()).unwrap();
    assert_eq!((kept.removed.len(), kept.young, kept.snapshots), (0, 1, 2));
    let planned = gc(&place.store, GcOptions { dry_run: true, ..NOW }).unwrap();
    assert_eq!(planned.removed.iter().map(|it| &*it.name).collect::<Vec<_>>(), [&orphan]);
    assert!(place.path("store").join(&orphan).exists());
    let removed = gc(&place.store, NOW).unwrap();
    assert_eq!((&removed.removed, removed.live), (&planned.removed, kept.live));
    assert!(foreign.exists());
    fs::remove_file(foreign).unwrap();
    assert_eq!(set(&place), both);

    // The second snapshot keeps the pack of the first that it shares.
    fs::remove_file(place.path("store/snapshots/first")).unwrap();
    let removed = gc(&place.store, NOW).unwrap();
    println!("removed {:?}", removed.removed);
    assert_eq!(removed.removed.len(), 1, "the index of the first");
    verify(&place.store, "second", &mut |_| true).unwrap();
    fs::remove_file(place.path("store/snapshots/second")).unwrap();
    gc(&place.store, NOW).unwrap();
    assert_eq!(set(&place).len(), 0, "of {} objects", first.len());
}

#[test]
fn unreadable_snapshot_stops_removal() {
    let place = Place::new();
    place.push("vm", &mixed(1 << 20, 52), |push| push).unwrap();
    let orphan = place.path("store/packs").join("ab".repeat(32));
    fs::write(&orphan, "x").unwrap();
    let manifest = place.path("store/snapshots/vm");
    let right = fs::read(&manifest).unwrap();
    fs::write(&manifest, &right[..100]).unwrap();
    println!("{}", gc(&place.store, NOW).unwrap_err());
    fs::write(&manifest, &right).unwrap();
    let index = fs::read_dir(place.path("store/index")).unwrap().next().unwrap().unwrap().path();
    let content = fs::read(&index).unwrap();
    fs::remove_file(&index).unwrap();
    println!("{}", gc(&place.store, NOW).unwrap_err());
    assert!(orphan.exists());
    fs::write(&index, content).unwrap();
    assert_eq!(gc(&place.store, NOW).unwrap().removed.len(), 1);
    assert_eq!(DEFAULT_GRACE.as_secs(), 86400);
}

#[test]
fn working_set_lives_with_its_index() {
    let place = Place::new();
    place.push("vm", &mixed(1 << 20, 53), |push| push).unwrap();
    let folder = place.path("store/ws");
    fs::create_dir_all(&folder).unwrap();
    let index = fs::read_dir(place.path("store/index")).unwrap().next().unwrap().unwrap();
    let (own, other) = (folder.join(index.file_name()), folder.join("cd".repeat(32)));
    fs::write(&own, "x").unwrap();
    fs::write(&other, "x").unwrap();
    assert_eq!(gc(&place.store, NOW).unwrap().removed.len(), 1);
    assert!(own.exists() && !other.exists());
}
