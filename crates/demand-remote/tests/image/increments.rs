// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots with a parent store what has changed.

use std::fs;

use demand_remote::image::{Compression, ImageError, Push, info, pull, verify};
use demand_source::HashedImage;

use crate::support::{PAGE, Place, Random, check_content, mixed, read, records};

const ZSTD: Compression = Compression::Zstd(3);

/// Changes about `percent` of the pages, in runs of up to `run` pages, and returns them.
fn change(content: &mut [u8], percent: usize, run: usize, random: &mut Random) -> Vec<usize> {
    let pages = content.len() / PAGE;
    let mut changed = std::collections::BTreeSet::new();
    while changed.len() * 100 < pages * percent {
        let first = random.below(pages);
        for page in first..pages.min(first + 1 + random.below(run)) {
            records(&mut content[page * PAGE..][..PAGE], random);
            changed.insert(page);
        }
    }
    changed.into_iter().collect()
}

/// Returns what pages take if each is compressed alone.
fn compressed(content: &[u8], pages: &[usize]) -> usize {
    let page = |page: &usize| &content[page * PAGE..][..PAGE];
    pages.iter().map(|at| zstd::bulk::compress(page(at), 3).unwrap().len()).sum()
}

#[test]
fn increment_stores_what_has_changed() {
    let mut random = Random::new(30);
    let mut content = vec![0; 24 << 20];
    records(&mut content, &mut random);
    for (chunk_size, run, limit) in [
        (64 << 10, 64, Some(1.5)),
        (64 << 10, 256, Some(1.5)),
        (16 << 10, 16, Some(1.5)),
        (64 << 10, 1, None),
    ] {
        let place = Place::new();
        place.push("vm", &content, |push| push.chunk_size(chunk_size).compression(ZSTD)).unwrap();
        let mut next = content.clone();
        let pages = change(&mut next, 5, run, &mut random);
        let summary = place
            .push("next", &next, |push| push.chunk_size(chunk_size).compression(ZSTD).parent("vm"))
            .unwrap();
        let least = compressed(&next, &pages);
        let ratio = summary.pack_bytes as f64 / least as f64;
        println!(
            "{} changed pages in runs of up to {run}, chunks of {} KiB: {} KiB stored, {} KiB \
             compressed alone, ratio {ratio:.2}; {:?}",
            pages.len(),
            chunk_size >> 10,
            summary.pack_bytes >> 10,
            least >> 10,
            summary.chunks
        );
        assert!(limit.is_none_or(|limit| ratio <= limit), "{ratio}");
        check_content(&place.open("next"), &next);
        check_content(&place.open("vm"), &content);
        let shared = info(&place.store, "next").unwrap().shared;
        assert_eq!(shared, Some(summary.chunks.reused));
        // The parent is not needed to read.
        fs::remove_file(place.path("store/snapshots/vm")).unwrap();
        verify(&place.store, "next", &mut |_| true).unwrap();
    }
}

#[test]
fn unchanged_image_stores_no_chunk() {
    let place = Place::new();
    let content = mixed(4 << 20, 31);
    place.push("vm", &content, |push| push).unwrap();
    let summary = place.push("next", &content, |push| push.parent("vm")).unwrap();
    assert_eq!((summary.pack_bytes, summary.chunks.reused), (0, summary.chunks.stored));
    assert_eq!(summary.written, 1, "the index is the same object: {summary:?}");
}

#[test]
fn local_parent_saves_compressing() {
    let place = Place::new();
    let mut content = mixed(8 << 20, 32);
    place.push("vm", &content, |push| push).unwrap();
    let local = place.path("local");
    pull(&place.store, "vm", &local, &mut |_| true).unwrap();
    let image = HashedImage::open(local.join("memory"), local.join("hashes")).unwrap();
    change(&mut content, 5, 64, &mut Random::new(33));
    // Another compression, so only the local image shows what is the same.
    let other = Compression::Lz4;
    let summary = place
        .push_beside("next", &content, Some(&image), |push| push.parent("vm").compression(other))
        .unwrap();
    assert!(summary.chunks.reused * 2 > summary.chunks.stored, "{summary:?}");
    check_content(&place.open("next"), &content);
    let refused = place.push("x", &content, |push| push.parent("next").chunk_size(16 << 10));
    assert!(matches!(refused, Err(ImageError::Parent { .. })), "{refused:?}");
    let refused = place.push_beside("x", &content, Some(&image), |push| push);
    assert!(matches!(refused, Err(ImageError::Parent { .. })), "{refused:?}");
}

#[test]
fn hundred_generations_open_like_the_first() {
    let place = Place::new();
    let mut random = Random::new(34);
    let mut content = vec![0; 2 << 20];
    records(&mut content, &mut random);
    place.push("gen-0", &content, |push| with_parent(push, None)).unwrap();
    let first = place.open("gen-0").stats();
    let mut stored = 0;
    for generation in 1..=100 {
        change(&mut content, 1, 4, &mut random);
        let parent = Some(format!("gen-{}", generation - 1));
        let name = format!("gen-{generation}");
        stored += place.push(&name, &content, |push| with_parent(push, parent)).unwrap().pack_bytes;
    }
    let image = place.open("gen-100");
    let facts = info(&place.store, "gen-100").unwrap();
    println!(
        "generation 100 opens with {:?}, generation 0 with {first:?}; {} packs, {} KiB, of which \
         {} KiB are stored chunks; all increments stored {} KiB",
        image.stats(),
        facts.packs,
        facts.pack_bytes >> 10,
        facts.stored_bytes >> 10,
        stored >> 10
    );
    assert_eq!(image.stats().requests, first.requests);
    assert!(facts.packs <= 80, "{} packs", facts.packs);
    let before = image.stats().requests;
    read(&image, 0, PAGE).unwrap();
    assert_eq!(image.stats().requests, before + 1);
    check_content(&image, &content);
    verify(&place.store, "gen-100", &mut |_| true).unwrap();
}

fn with_parent(push: Push<'_>, parent: Option<String>) -> Push<'_> {
    let push = push.chunk_size(16 << 10).compression(Compression::Zstd(1));
    match parent {
        Some(parent) => push.parent(parent),
        None => push,
    }
}

#[test]
fn thin_packs_are_stored_again() {
    let place = Place::new();
    let mut random = Random::new(35);
    let mut content = vec![0; 4 << 20];
    records(&mut content, &mut random);
    place.push("vm", &content, |push| push).unwrap();
    // Less than a quarter of the first pack stays in use.
    records(&mut content[1 << 19..], &mut random);
    let second = place.push("second", &content, |push| push.parent("vm")).unwrap();
    assert_eq!((second.packs, second.chunks.reused), (2, 8));
    let third = place.push("third", &content, |push| push.parent("second")).unwrap();
    assert_eq!((third.packs, third.chunks.reused), (2, 56));
    check_content(&place.open("third"), &content);
}

#[test]
fn scattered_packs_are_gathered() {
    let place = Place::new();
    let mut random = Random::new(36);
    let mut content = vec![0; 8 << 20];
    records(&mut content, &mut random);
    let none = Compression::None;
    place.push("gen-0", &content, |push| with_parent(push, None).compression(none)).unwrap();
    let mut packs = Vec::new();
    for generation in 1..=72 {
        // Seven chunks of their own, so that no pack is thin.
        let at = (generation - 1) * 7 * (16 << 10);
        records(&mut content[at..at + 7 * (16 << 10)], &mut random);
        let parent = Some(format!("gen-{}", generation - 1));
        let name = format!("gen-{generation}");
        let pushed =
            place.push(&name, &content, |push| with_parent(push, parent).compression(none));
        packs.push(pushed.unwrap().packs);
    }
    println!("packs of each generation: {packs:?}");
    assert_eq!(packs.iter().max(), Some(&65));
    assert!(packs[65..].iter().all(|packs| *packs <= 41));
    check_content(&place.open("gen-72"), &content);
}
