// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the decoders of chunked images: heads and blocks of an index with the right digests,
//! manifests with the right checksum, and stored chunks. What is accepted refers to nothing outside
//! its bounds, and is encoded as it was.
#![no_main]

mod input;

use demand_remote::image::format::{
    Block, BlockRef, Coding, Digest, Geometry, Head, Pack, decode_chunk, digest,
};
use demand_remote::image::{Manifest, ObjectId};
use input::Input;
use libfuzzer_sys::fuzz_target;

const HEADER: usize = 4096;
/// Offset of the digest in a head.
const DIGEST: std::ops::Range<usize> = 96..112;
const PAGE: usize = 4096;

/// Checks a head. The reserved bytes of its header are not in the input.
fn check_head(fields: &[u8]) {
    let (header, tables) = fields.split_at(fields.len().min(DIGEST.end));
    let mut bytes = header.to_vec();
    bytes.resize(HEADER, 0);
    bytes.extend(tables);
    assert!(bytes[DIGEST] == digest(&bytes) || Head::decode(&bytes).is_err());
    bytes[DIGEST].fill(0);
    let digest: Digest = digest(&bytes);
    bytes[DIGEST].copy_from_slice(&digest);
    let Ok(head) = Head::decode(&bytes) else { return };
    assert_eq!(head.encode(), bytes);
    let mut next = bytes.len() as u64;
    for (number, block) in (0..).zip(&head.blocks) {
        let Some(block) = block else { continue };
        assert_eq!(block.offset, next);
        next += head.geometry.block_len(number) as u64;
    }
    assert_eq!(head.index_len(), next);
}

/// Checks the only block of an index of up to 32 chunks.
fn check_block(input: &mut Input<'_>) {
    let chunk_size = 1 << (14 + input.byte() % 7);
    let pages = u64::from(input.byte()) + 1;
    let Ok(geometry) = Geometry::new(pages * PAGE as u64, chunk_size) else { return };
    let packs = (0..input.byte() % 3).map(|byte| {
        let (len, chunks) = (u32::from_le_bytes(input.bytes()) % (64 << 20), 1 + u16::from(byte));
        Pack { id: ObjectId([byte; 32]), len: len + 1, chunks }
    });
    let packs = packs.collect();
    let mut bytes = input.rest().to_vec();
    bytes.resize(geometry.block_len(0), 0);
    let offset = HEADER as u64;
    let block = BlockRef { offset, digest: digest(&bytes) };
    let (generation, stored, blocks) = ([0; 16], 0, vec![Some(block)]);
    let head = Head { geometry, generation, stored, packs, blocks };
    let Ok(block) = Block::decode(&bytes, &head, 0) else { return };
    assert_eq!(block.entries().len() as u64, geometry.chunks());
    for (entry, bytes) in block.entries().iter().zip(bytes.chunks(32)) {
        let Some(entry) = entry else {
            assert!(bytes.iter().all(|byte| *byte == 0));
            continue;
        };
        assert_eq!(entry.encode(), bytes);
        let pack = head.packs[entry.pack as usize];
        assert!(entry.offset.checked_add(entry.len).is_some_and(|end| end <= pack.len));
        assert!(entry.ordinal < pack.chunks);
    }
}

fn check_chunk(input: &mut Input<'_>) {
    let coding = [Coding::None, Coding::Lz4, Coding::Zstd][usize::from(input.byte() % 3)];
    let len = usize::from(input.byte() % 17) * PAGE;
    let stored = input.rest();
    let Ok(content) = decode_chunk(coding, stored, len) else { return };
    assert_eq!(content.len(), len);
    for (page, hash) in content.chunks(PAGE).zip(stored.chunks(8)) {
        assert_eq!(demand_source::page_hash(page).to_le_bytes(), hash);
    }
}

fn check_manifest(text: &[u8]) {
    let _ = Manifest::parse(text);
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(text) else { return };
    let Some(keys) = value.as_object_mut() else { return };
    keys.insert("checksum".into(), "0".repeat(64).into());
    let checksum = ObjectId::of(value.to_string().as_bytes()).to_string();
    value["checksum"] = checksum.into();
    let Ok(manifest) = Manifest::parse(value.to_string().as_bytes()) else { return };
    let geometry = manifest.geometry().expect("the sizes were checked");
    assert!(manifest.index.head_size <= manifest.index.size);
    assert!(manifest.index.size <= HEADER as u64 + 32 * geometry.blocks() + 72 * geometry.chunks());
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.byte() {
        b'h' => check_head(input.rest()),
        b'b' => check_block(&mut input),
        b'c' => check_chunk(&mut input),
        b'm' => check_manifest(input.rest()),
        _ => {}
    }
});
