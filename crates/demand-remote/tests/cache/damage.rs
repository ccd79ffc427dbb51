// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Damaged files of a cache: the chunks are fetched again, and nothing wrong is delivered.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::shared::{CHUNK, distinct, files, push, read_all};
use crate::support::{PAGE, Place};

/// Bytes of a record: a digest, and the hashes of the pages.
const RECORD: usize = 16 + CHUNK / PAGE * 8;
/// Offset of the first content.
const CONTENTS: usize = (512 * RECORD).next_multiple_of(PAGE);
const CHUNKS: usize = 6;

/// Returns an image with a pack of six chunks, and a cache that has all of them.
fn prepared() -> (Place, Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let content = distinct(CHUNKS, 10);
    push(&place, "vm", &content);
    let cache = place.path("cache");
    assert_eq!(read_all(&place, "vm", &cache, &content).0, CHUNKS as u64);
    let right = fs::read(&files(&cache)[0]).unwrap();
    assert_eq!(right.len(), CONTENTS + 512 * CHUNK);
    assert!(right[CONTENTS..][..content.len()] == content, "the layout is another one");
    (place, content, right)
}

/// Reads all with a damaged file, expects that so many chunks are fetched again, and that they are
/// there afterwards.
fn expect(place: &Place, content: &[u8], again: usize, what: &str) {
    let cache = place.path("cache");
    let (requests, stats) = read_all(place, "vm", &cache, content);
    assert_eq!((requests, stats.misses), (again as u64, again as u64), "{what}");
    assert_eq!(read_all(place, "vm", &cache, content).0, 0, "not repaired: {what}");
}

#[test]
fn flipped_bits_are_fetched_again() {
    let (place, content, right) = prepared();
    let file = files(&place.path("cache"))[0].clone();
    for (chunk, at) in [
        (0, 0),
        (0, 15),
        (1, RECORD + 16),
        (1, 2 * RECORD - 1),
        (5, 5 * RECORD + 9),
        (0, CONTENTS),
        (2, CONTENTS + 2 * CHUNK + PAGE),
        (2, CONTENTS + 3 * CHUNK - 1),
        (5, CONTENTS + 5 * CHUNK + PAGE - 1),
    ] {
        for bit in [0, 7] {
            let mut bytes = right.clone();
            bytes[at] ^= 1 << bit;
            fs::write(&file, &bytes).unwrap();
            expect(&place, &content, 1, &format!("bit {bit} of byte {at}, of chunk {chunk}"));
            assert!(fs::read(&file).unwrap() == right);
        }
    }
    // No chunk has its bytes there.
    for at in [CHUNKS * RECORD, CONTENTS - 1, CONTENTS + CHUNKS * CHUNK] {
        let mut bytes = right.clone();
        bytes[at] ^= 1;
        fs::write(&file, &bytes).unwrap();
        expect(&place, &content, 0, &format!("byte {at}"));
    }
}

#[test]
fn shortened_files_are_filled_again() {
    let (place, content, right) = prepared();
    let file = files(&place.path("cache"))[0].clone();
    for (len, again) in [
        (0, 6),
        (1, 6),
        (3 * RECORD, 6),
        (CONTENTS, 6),
        (CONTENTS + 1, 6),
        (CONTENTS + 2 * CHUNK, 4),
        // The last page of a chunk is zeros, as what a file is extended with.
        (CONTENTS + 3 * CHUNK - PAGE, 3),
        (CONTENTS + 3 * CHUNK - PAGE - 1, 4),
        (right.len() - 1, 0),
    ] {
        fs::write(&file, &right[..len]).unwrap();
        expect(&place, &content, again, &format!("{len} bytes"));
        assert!(fs::read(&file).unwrap() == right);
    }
}

#[test]
fn foreign_bytes_are_no_chunk() {
    let (place, content, right) = prepared();
    let file = files(&place.path("cache"))[0].clone();
    let write = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = right.clone();
        change(&mut bytes);
        fs::write(&file, &bytes).unwrap();
    };
    write(&|bytes| bytes.fill(0));
    expect(&place, &content, 6, "zeros");
    write(&|bytes| bytes.fill(0xff));
    expect(&place, &content, 6, "ones");
    let content_of = |chunk: usize| CONTENTS + chunk * CHUNK..CONTENTS + (chunk + 1) * CHUNK;
    write(&|bytes| bytes.copy_within(content_of(1), CONTENTS + 2 * CHUNK));
    expect(&place, &content, 1, "the content of another chunk");
    write(&|bytes| bytes.copy_within(RECORD..2 * RECORD, 2 * RECORD));
    expect(&place, &content, 1, "the record of another chunk");
    write(&|bytes| {
        bytes.copy_within(content_of(1), CONTENTS + 2 * CHUNK);
        bytes.copy_within(RECORD..2 * RECORD, 2 * RECORD);
    });
    expect(&place, &content, 1, "record and content of another chunk");
    // All of another pack, under this one's name.
    let other = Place::new();
    push(&other, "vm", &distinct(CHUNKS, 11));
    read_all(&other, "vm", &other.path("cache"), &distinct(CHUNKS, 11));
    fs::copy(&files(&other.path("cache"))[0], &file).unwrap();
    expect(&place, &content, 6, "another pack");
}

#[test]
fn damage_under_an_open_file_is_noticed() {
    use crate::shared::{ROOMY, open};
    use crate::support::read;
    use demand_remote::HostCache;

    let (place, content, _) = prepared();
    let path = place.path("cache");
    let cache = HostCache::open(&path, ROOMY).unwrap();
    let image = open(&place, "vm", &cache);
    let check = || {
        for at in (0..content.len()).step_by(PAGE) {
            assert!(read(&image, at, PAGE).unwrap() == content[at..at + PAGE], "{at}");
        }
    };
    check();
    assert_eq!(cache.stats().misses, 0);
    let damage = |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap();
    damage(&files(&path)[0]).write_all_at(&[0xaa; 3], (CONTENTS + 100) as u64).unwrap();
    check();
    assert!(cache.stats().misses > 0, "{:?}", cache.stats());
    damage(&files(&path)[0]).set_len(0).unwrap();
    check();
    fs::remove_file(&files(&path)[0]).unwrap();
    check();
    println!("{:?}", cache.stats());
}
