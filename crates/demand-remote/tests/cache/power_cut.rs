// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power cuts: whatever part of the writes has reached the disk, readers get the right bytes.

use std::fs;

use crate::shared::{CHUNK, distinct, files, push, read_all};
use crate::support::{PAGE, Place, Random};

const RECORD: usize = 16 + CHUNK / PAGE * 8;
const CONTENTS: usize = (512 * RECORD).next_multiple_of(PAGE);
const CHUNKS: usize = 4;

/// Leaves a cache with this file, and reads all through it.
fn read_after(place: &Place, content: &[u8], bytes: &[u8], what: &str) -> u64 {
    let file = files(&place.path("cache"))[0].clone();
    fs::write(&file, bytes).unwrap();
    let (requests, _) = read_all(place, "vm", &place.path("cache"), content);
    assert_eq!(files(&place.path("cache")).len(), 1, "{what}");
    requests
}

fn prepared() -> (Place, Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let content = distinct(CHUNKS, 20);
    push(&place, "vm", &content);
    read_all(&place, "vm", &place.path("cache"), &content);
    let right = fs::read(&files(&place.path("cache"))[0]).unwrap();
    (place, content, right)
}

#[test]
fn every_prefix_of_the_writes_is_safe() {
    let (place, content, right) = prepared();
    let mut bytes = Vec::new();
    // The file is created, and gets its length; then each chunk's content and its record.
    assert_eq!(read_after(&place, &content, &bytes, "an empty file"), CHUNKS as u64);
    bytes.resize(right.len(), 0);
    let mut cuts = 0;
    for chunk in 0..CHUNKS {
        let parts = [(CONTENTS + chunk * CHUNK, CHUNK, 512 * 6), (chunk * RECORD, RECORD, 8)];
        for (start, len, step) in parts {
            for at in (start..start + len).step_by(step) {
                // Bytes that are zeros in the end need no write.
                let lacks = |chunk: &usize| {
                    let (record, content) = (chunk * RECORD, CONTENTS + chunk * CHUNK);
                    bytes[record..record + RECORD] != right[record..record + RECORD]
                        || bytes[content..content + CHUNK] != right[content..content + CHUNK]
                };
                let absent = (0..CHUNKS).filter(lacks).count() as u64;
                let fetched = read_after(&place, &content, &bytes, &format!("cut at byte {at}"));
                assert_eq!(fetched, absent, "cut at byte {at}");
                let end = (at + step).min(start + len);
                bytes[at..end].copy_from_slice(&right[at..end]);
                cuts += 1;
            }
        }
    }
    assert_eq!(read_after(&place, &content, &bytes, "all"), 0);
    println!("{cuts} cuts");
}

#[test]
fn blocks_may_arrive_in_any_order() {
    let (place, content, right) = prepared();
    let mut random = Random::new(21);
    for round in 0..60 {
        let mut bytes = vec![0; right.len()];
        // Sectors of the records, pages of the contents.
        let blocks = (0..CHUNKS * RECORD).step_by(32).map(|at| (at, 32));
        let blocks =
            blocks.chain((0..CHUNKS * CHUNK).step_by(PAGE).map(|at| (CONTENTS + at, PAGE)));
        for (at, len) in blocks {
            if random.below(4) > 0 {
                bytes[at..at + len].copy_from_slice(&right[at..at + len]);
            }
        }
        let fetched = read_after(&place, &content, &bytes, &format!("round {round}"));
        assert!(fetched > 0, "round {round}");
    }
}
