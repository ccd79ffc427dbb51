// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupted pushes are resumed, and leave no snapshot.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use demand_remote::image::{Compression, ImageError, Push, RemoteImage};

use crate::support::{Place, Random, check_content, noise, objects};

fn with(push: Push<'_>) -> Push<'_> {
    push.chunk_size(16 << 10).compression(Compression::Lz4)
}

/// Returns the objects of a store and their content.
fn all(store: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let relative = |path: &PathBuf| path.strip_prefix(store).unwrap().to_owned();
    objects(store).iter().map(|path| (relative(path), fs::read(path).unwrap())).collect()
}

fn copy(object: &Path, from: &Path, to: &Path) -> PathBuf {
    let copy = to.join(object.strip_prefix(from).unwrap());
    fs::create_dir_all(copy.parent().unwrap()).unwrap();
    fs::copy(object, &copy).unwrap();
    copy
}

#[test]
fn push_is_resumed_after_every_write() {
    let mut content = vec![0; 20 << 20];
    noise(&mut content[1 << 20..], &mut Random::new(20));
    let whole = Place::new();
    let summary = whole.push("vm", &content, with).unwrap();
    let objects = whole.objects();
    assert_eq!((summary.written, summary.skipped), (objects.len() as u64, 0));
    assert!(summary.packs > 2, "{summary:?}");
    let from = whole.path("store");
    for count in 0..=objects.len() {
        let place = Place::new();
        for object in &objects[..count] {
            copy(object, &from, &place.path("store"));
        }
        if count < objects.len() {
            let opened = RemoteImage::open(&place.store, "vm");
            assert!(matches!(opened, Err(ImageError::NoSnapshot { .. })), "{count}");
        }
        let summary = place.push("vm", &content, with).unwrap();
        let skipped = count.min(objects.len() - 1) as u64;
        assert_eq!((summary.skipped, summary.written), (skipped, objects.len() as u64 - skipped));
        assert!(all(&place.path("store")) == all(&from), "after {count} objects");
    }
    check_content(&whole.open("vm"), &content);
    println!("{} objects, resumed after each", objects.len());
}

#[test]
fn partial_object_is_written_again() {
    let mut content = vec![0; 1 << 20];
    noise(&mut content, &mut Random::new(21));
    let place = Place::new();
    place.push("vm", &content, with).unwrap();
    let right = all(&place.path("store"));
    for object in place.objects() {
        let bytes = fs::read(&object).unwrap();
        fs::write(&object, &bytes[..bytes.len() / 2]).unwrap();
    }
    let summary = place.push("vm", &content, with).unwrap();
    assert_eq!(summary.skipped, 0);
    assert!(all(&place.path("store")) == right);
}
