// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the decoders of working sets: a head with the right digest, and its table with the right
//! one. What is accepted refers to nothing outside the image and the object.
#![no_main]

use std::collections::HashSet;

use demand_remote::image::format::digest;
use demand_remote::working_set::format::{HEAD_BYTES, Head, decode_table};
use libfuzzer_sys::fuzz_target;

/// Offset of the digest in a head.
const DIGEST: std::ops::Range<usize> = 96..112;

fuzz_target!(|data: &[u8]| {
    let (fields, table) = data.split_at(data.len().min(DIGEST.start));
    let mut bytes = fields.to_vec();
    bytes.resize(HEAD_BYTES, 0);
    let signature = digest(&bytes);
    bytes[DIGEST].copy_from_slice(&signature);
    let Ok(head) = Head::decode(&bytes) else { return };
    assert_eq!(head.encode()[..], bytes);
    // The lengths and the table's digest are made to fit, so that its fields are reached.
    let begin = (HEAD_BYTES + table.len()) as u64;
    for len in [head.len, begin] {
        let table_len = table.len() as u64;
        let head = Head { table_len, table: digest(table), len, ..head };
        let Ok(frames) = decode_table(&head, table) else { continue };
        assert_eq!(frames.len() as u64, u64::from(head.frames));
        let mut next = begin;
        for stored in frames.iter().filter_map(|frame| frame.stored) {
            assert_eq!(stored.offset, next);
            next += stored.len;
        }
        assert_eq!(next, len);
        let mut pages = HashSet::new();
        for entry in frames.iter().flat_map(|frame| &frame.entries) {
            assert!(entry.page < 1 << 36 && entry.seen != 0 && pages.insert(entry.page));
        }
    }
});
