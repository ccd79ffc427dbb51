// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images are read back as they were pushed.

use std::fs;

use demand_remote::image::{
    Compression, ImageError, Push, RemoteImage, RemoteOptions, info, pull, verify,
};
use demand_source::{Destination, Extent, HashedImage, PageSource};

use crate::support::{GENERATION, PAGE, Place, Random, check_content, mixed, noise, read, records};

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd(3)];

/// Returns a name for each kind of content, and the content.
fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = vec![0; 1 << 20];
    noise(&mut random, &mut Random::new(1));
    let mut compressible = vec![0; (2 << 20) + 3 * PAGE];
    records(&mut compressible, &mut Random::new(2));
    let mut sparse = vec![0; 5 << 20];
    for (at, byte) in [(0, 1), ((3 << 20) + 17, 2), ((5 << 20) - 1, 3)] {
        sparse[at] = byte;
    }
    // It ends within a page.
    let uneven = mixed((3 << 20) + PAGE + 77, 3);
    vec![("random", random), ("compressible", compressible), ("sparse", sparse), ("mixed", uneven)]
}

#[test]
fn content_is_read_back() {
    for (kind, content) in contents() {
        for chunk_size in [16 << 10, 64 << 10, 1 << 20] {
            for compression in COMPRESSIONS {
                let place = Place::new();
                check(&place, (kind, &content), chunk_size, compression);
            }
        }
    }
}

fn check(place: &Place, image: (&str, &[u8]), chunk_size: u32, compression: Compression) {
    let (kind, content) = image;
    let summary = place
        .push("vm", content, |push| push.chunk_size(chunk_size).compression(compression))
        .unwrap();
    let image = place.open("vm");
    check_content(&image, content);
    assert_eq!(image.file("state").unwrap(), b"the VM's state");
    assert!(matches!(image.file("other"), Err(ImageError::NoFile { .. })));
    assert_eq!(image.generation(), GENERATION);
    let checked = verify(&place.store, "vm", &mut |_| true).unwrap();
    assert_eq!((checked.chunks, checked.files), (summary.chunks.stored, 1));
    println!(
        "{kind} at {} KiB, {compression}: {} KiB become {} KiB in {} packs",
        chunk_size >> 10,
        content.len() >> 10,
        summary.pack_bytes >> 10,
        summary.packs
    );
}

#[test]
fn zero_chunks_are_holes() {
    let place = Place::new();
    let content = mixed(8 << 20, 4);
    place.push("vm", &content, |push| push).unwrap();
    let image = place.open("vm");
    let before = image.stats();
    let (mut at, mut holes) = (0, 0);
    while at < content.len() {
        let extent = image.extent_now(at as u64).unwrap().unwrap();
        let end = usize::try_from(extent.end()).unwrap();
        assert!(end > at);
        let chunks = content[at..end].chunks(64 << 10);
        for chunk in chunks {
            assert_eq!(chunk.iter().all(|byte| *byte == 0), extent.is_hole());
        }
        if let Extent::Hole { .. } = extent {
            holes += end - at;
            assert!(read(&image, at, end - at).unwrap().iter().all(|byte| *byte == 0));
        }
        at = end;
    }
    assert!(holes > 0 && holes < content.len());
    assert_eq!(image.stats(), before, "holes cost no request");
    assert!(image.extent_now(content.len() as u64).unwrap().is_err());
}

#[test]
fn arbitrary_ranges_are_read() {
    let place = Place::new();
    let content = mixed(4 << 20, 5);
    place.push("vm", &content, |push| push.compression(Compression::Lz4)).unwrap();
    let options = RemoteOptions { recent_bytes: 128 << 10, ..RemoteOptions::default() };
    let image = RemoteImage::open_with(&place.store, "vm", options).unwrap();
    let mut random = Random::new(6);
    for _ in 0..200 {
        let (offset, len) = (random.below(content.len()), random.below(300_000));
        let len = len.min(content.len() - offset);
        assert!(read(&image, offset, len).unwrap() == content[offset..offset + len]);
    }
    let mut page = [0; PAGE];
    for offset in [content.len() as u64, u64::MAX - 1, content.len() as u64 - 1] {
        assert!(image.read_through(offset, &mut Destination::from(&mut page[..])).is_err());
    }
}

#[test]
fn kept_chunks_are_read_at_once() {
    let place = Place::new();
    let content = mixed(1 << 20, 7);
    let at = content.iter().position(|byte| *byte != 0).unwrap() / PAGE * PAGE;
    place.push("vm", &content, |push| push).unwrap();
    let image = place.open("vm");
    let mut page = [0; PAGE];
    assert!(image.read_now(at as u64, &mut Destination::from(&mut page[..])).is_none());
    read(&image, at, PAGE).unwrap();
    let before = image.stats();
    for neighbour in (at & !0xffff..).step_by(PAGE).take(16) {
        let mut page = [0xee; PAGE];
        let read = image.read_now(neighbour as u64, &mut Destination::from(&mut page[..]));
        read.unwrap().unwrap();
        assert_eq!(page, content[neighbour..neighbour + PAGE]);
    }
    assert_eq!(image.stats(), before);
}

#[test]
fn pulled_snapshot_is_a_hashed_image() {
    let place = Place::new();
    let content = mixed(6 << 20, 8);
    let empty = place.path("empty");
    fs::write(&empty, "").unwrap();
    place
        .push("team/vm", &content, |push| push.chunk_size(16 << 10).file("empty", &empty))
        .unwrap();
    let to = place.path("pulled");
    let summary = pull(&place.store, "team/vm", &to, &mut |_| true).unwrap();
    assert!(fs::read(to.join("memory")).unwrap() == content);
    assert_eq!(fs::read(to.join("state")).unwrap(), b"the VM's state");
    assert_eq!(fs::read(to.join("empty")).unwrap(), b"");
    let image = HashedImage::open(to.join("memory"), to.join("hashes")).unwrap();
    assert_eq!(image.generation(), GENERATION);
    image.verify(&mut |_| true).unwrap();
    assert!(summary.pages.holes > 0);
    // The files exist, so another copy is refused, and removes nothing.
    assert!(pull(&place.store, "team/vm", &to, &mut |_| true).is_err());
    assert!(to.join("memory").exists());
    let cancelled = pull(&place.store, "team/vm", &place.path("other"), &mut |_| false);
    assert!(matches!(cancelled, Err(ImageError::Cancelled)), "{cancelled:?}");
    assert_eq!(fs::read_dir(place.path("other")).unwrap().count(), 0);
    // A hashed image is pushed like any other, and gives the same objects.
    let push = Push::new(&image, image.generation()).chunk_size(16 << 10);
    let summary = push.file("state", to.join("state")).run(&place.store, "again", &mut |_| true);
    assert_eq!(summary.unwrap().written, 1);
}

#[test]
fn info_counts_chunks() {
    let place = Place::new();
    let mut content = vec![0; 1 << 20];
    noise(&mut content[..3 << 16], &mut Random::new(9));
    place.push("vm", &content, |push| push).unwrap();
    content[1 << 16] ^= 1;
    place.push("next", &content, |push| push.parent("vm")).unwrap();
    let facts = info(&place.store, "next").unwrap();
    assert_eq!((facts.chunks, facts.zero, facts.shared, facts.packs), (16, 13, Some(2), 2));
    assert_eq!(facts.stored_bytes, 3 * ((64 << 10) + 128));
    assert_eq!(facts.manifest.parent.as_deref(), Some("vm"));
    fs::remove_file(place.path("store/snapshots/vm")).unwrap();
    assert_eq!(info(&place.store, "next").unwrap().shared, None);
    println!("{facts:?}");
}

#[test]
fn wrong_names_and_options_are_refused() {
    let place = Place::new();
    let content = mixed(1 << 20, 10);
    let refused = |name: &str, with: fn(Push<'_>) -> Push<'_>| {
        let error = place.push(name, &content, with).unwrap_err();
        println!("{error}");
        error
    };
    assert!(matches!(refused("../vm", |push| push), ImageError::Name { .. }));
    assert!(matches!(refused("vm", |push| push.chunk_size(4096)), ImageError::Options(_)));
    assert!(matches!(refused("vm", |push| push.chunk_size(65537)), ImageError::Options(_)));
    let level = Compression::Zstd(23);
    let refused_level = place.push("vm", &content, |push| push.compression(level));
    assert!(matches!(refused_level, Err(ImageError::Options(_))));
    assert!(matches!(refused("vm", |push| push.file("state", "/x")), ImageError::Name { .. }));
    assert!(matches!(refused("vm", |push| push.file("memory", "/x")), ImageError::Name { .. }));
    assert!(matches!(refused("vm", |push| push.file("x", "/nowhere")), ImageError::File { .. }));
    assert!(matches!(refused("vm", |push| push.parent("none")), ImageError::NoSnapshot { .. }));
    assert!(place.objects().is_empty());
    let image = place.image(&content);
    let cancelled = Push::new(&image, GENERATION).run(&place.store, "vm", &mut |_| false);
    assert!(matches!(cancelled, Err(ImageError::Cancelled)));
    let missing = RemoteImage::open(&place.store, "vm").unwrap_err();
    println!("{missing}");
    assert!(matches!(missing, ImageError::NoSnapshot { .. }));
}
