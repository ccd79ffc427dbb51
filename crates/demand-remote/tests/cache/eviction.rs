// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eviction: the cache keeps to its size, and its readers continue.

use std::fs;
use std::time::SystemTime;

use demand_remote::HostCache;
use test_support::wait::until;

use crate::shared::{CHUNK, ROOMY, distinct, files, open, push, used};
use crate::support::{Place, check_content};

const SIZE: u64 = 4 << 20;

#[test]
fn cache_keeps_to_its_size() {
    let place = Place::new();
    // Each image has a pack of 1 MiB.
    let contents: Vec<_> = (0..8).map(|seed| distinct(64, 30 + seed)).collect();
    let name = |image: usize| format!("vm{image}");
    for (image, content) in contents.iter().enumerate() {
        push(&place, &name(image), content);
    }
    let path = place.path("cache");
    let cache = HostCache::open(&path, SIZE).unwrap();
    let first = open(&place, &name(0), &cache);
    check_content(&first, &contents[0]);
    for (image, content) in contents.iter().enumerate() {
        check_content(&open(&place, &name(image), &cache), content);
        assert!(used(&path) <= SIZE, "{} bytes after image {image}", used(&path));
    }
    let all = 8 * 64 * CHUNK as u64;
    until("the chunks are not written", || cache.stats().written_bytes >= all);
    until("nothing is evicted", || used(&path) <= SIZE - SIZE / 8);
    println!("{} bytes in {} files, {:?}", used(&path), files(&path).len(), cache.stats());
    assert!(cache.stats().evicted >= 4 && used(&path) > SIZE / 2);
    // The packs that were used last are there, and those that were used first are not.
    let before = cache.stats().misses;
    check_content(&open(&place, &name(7), &cache), &contents[7]);
    assert_eq!(cache.stats().misses, before);
    check_content(&first, &contents[0]);
    assert_eq!(cache.stats().misses, before + 64);
}

#[test]
fn smaller_size_applies_when_opened() {
    let place = Place::new();
    let path = place.path("cache");
    for image in 0..4 {
        let (name, content) = (format!("vm{image}"), distinct(64, 40 + image));
        push(&place, &name, &content);
        crate::shared::read_all(&place, &name, &path, &content);
    }
    assert!(used(&path) >= 4 << 20);
    // Files of others are neither counted nor removed.
    let foreign = path.join("packs-v1/README");
    fs::write(&foreign, vec![1; 3 << 20]).unwrap();
    let target = place.path("target");
    fs::write(&target, "kept").unwrap();
    let link = path.join(format!("packs-v1/{}.16k", "0".repeat(64)));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    // The oldest of all, with another name elsewhere.
    let linked = path.join(format!("packs-v1/{}.16k", "1".repeat(64)));
    fs::write(place.path("twice"), "kept, too").unwrap();
    fs::hard_link(place.path("twice"), &linked).unwrap();
    fs::File::open(&linked).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let cache = HostCache::open(&path, 2 << 20).unwrap();
    assert!(cache.stats().evicted >= 2, "{:?}", cache.stats());
    assert!(foreign.exists() && link.is_symlink());
    assert_eq!(fs::read(&target).unwrap(), b"kept");
    assert!(!linked.exists());
    assert_eq!(fs::read(place.path("twice")).unwrap(), b"kept, too");
    assert!(used(&path) <= (5 << 20), "{}", used(&path));
    let cache = HostCache::open(&path, ROOMY).unwrap();
    assert_eq!(cache.stats().evicted, 0);
}
