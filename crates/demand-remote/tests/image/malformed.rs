// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The decoders return errors for bytes that are not of the format.

use demand_remote::image::format::{
    Block, BlockRef, Coding, Entry, Geometry, Head, Pack, decode_chunk, digest,
};
use demand_remote::image::{LayoutError, Manifest, ObjectId};
use proptest::collection::vec;
use proptest::prelude::*;

/// Offset of the digest in a head.
const DIGEST: std::ops::Range<usize> = 96..112;
const CODINGS: [Coding; 3] = [Coding::None, Coding::Lz4, Coding::Zstd];

fn seal(head: &mut [u8]) {
    head[DIGEST].fill(0);
    let digest = digest(head);
    head[DIGEST].copy_from_slice(&digest);
}

fn entry(pack: u32, offset: u32) -> Entry {
    let (coding, digest) = (Coding::None, [7; 16]);
    Entry { pack, offset, len: 128 + (64 << 10), coding, ordinal: 1, digest }
}

/// Returns an index of three blocks, the second of them zeros, and its first block.
fn index() -> (Head, Vec<u8>) {
    let geometry = Geometry::new(5000 * (64 << 10) + 4096, 64 << 10).unwrap();
    let pack = |byte| Pack { id: ObjectId([byte; 32]), len: 1 << 20, chunks: 9 };
    let mut head = Head {
        geometry,
        generation: [3; 16],
        stored: 2,
        packs: vec![pack(1), pack(2)],
        blocks: vec![None; 3],
    };
    let mut block = vec![0; geometry.block_len(0)];
    block[..32].copy_from_slice(&entry(0, 0).encode());
    block[320..352].copy_from_slice(&entry(1, 16).encode());
    let offset = head.head_len() as u64;
    head.blocks[0] = Some(BlockRef { offset, digest: digest(&block) });
    let offset = offset + block.len() as u64;
    head.blocks[2] = Some(BlockRef { offset, digest: [0; 16] });
    (head, block)
}

#[test]
fn head_and_block_are_read_back() {
    let (head, block) = index();
    assert_eq!(Head::decode(&head.encode()), Ok(head.clone()));
    let decoded = Block::decode(&block, &head, 0).unwrap();
    assert_eq!(decoded.entries()[0], Some(entry(0, 0)));
    assert_eq!(decoded.entries()[10], Some(entry(1, 16)));
    assert_eq!(decoded.entries().iter().flatten().count(), 2);
    assert_eq!(Block::decode(&[], &head, 1).unwrap().entries(), vec![None; 2048]);
    assert!(Block::decode(&[], &head, 3).is_err());
    assert!(Block::decode(&[], &head, u64::MAX).is_err());
}

#[test]
fn each_bit_of_a_head_counts() {
    let bytes = index().0.encode();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Head::decode(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn impossible_heads_are_refused() {
    let bytes = index().0.encode();
    // With the right digest, fields that say the impossible. Each is set to a few values.
    let fields = [
        (8, 4),
        (12, 4),
        (16, 8),
        (40, 4),
        (44, 4),
        (48, 8),
        (56, 8),
        (64, 8),
        (72, 8),
        (80, 8),
        (88, 8),
        (200, 1),
        (4128, 4),
        (4132, 2),
        (4134, 2),
        (4176, 8),
        (4184, 8),
        (4240, 8),
    ];
    for (at, len) in fields {
        for value in [u64::MAX, 1 << 40, 4097] {
            let mut damaged = bytes.clone();
            let value = value.to_le_bytes();
            if damaged[at..at + len] == value[..len] {
                continue;
            }
            damaged[at..at + len].copy_from_slice(&value[..len]);
            seal(&mut damaged);
            let decoded = Head::decode(&damaged);
            // There may be as many stored chunks, and a pack may have this length.
            let possible = [48, 4128].contains(&at) && value[2..] == [0; 6];
            assert!(decoded.is_err() || possible, "field at {at}");
        }
    }
    let shorter = |len: usize| {
        let mut bytes = bytes[..len].to_vec();
        seal(&mut bytes);
        Head::decode(&bytes)
    };
    assert!((112..bytes.len()).step_by(8).all(|len| shorter(len).is_err()));
}

#[test]
fn impossible_entries_are_refused() {
    let (mut head, block) = index();
    let mut refused = |entry: Entry| {
        let mut block = block.clone();
        block[64..96].copy_from_slice(&entry.encode());
        head.blocks[0].as_mut().unwrap().digest = digest(&block);
        Block::decode(&block, &head, 0).unwrap_err()
    };
    let right = entry(0, 0);
    for wrong in [
        Entry { pack: 2, ..right },
        Entry { pack: u32::MAX, ..right },
        Entry { offset: 8, ..right },
        Entry { offset: 1 << 20, ..right },
        Entry { offset: u32::MAX - 15, ..right },
        Entry { len: right.len + 1, ..right },
        Entry { len: 0, ..right },
        Entry { len: 128, coding: Coding::Zstd, ..right },
        Entry { coding: Coding::Lz4, ..right },
        Entry { ordinal: 9, ..right },
    ] {
        assert!(matches!(refused(wrong), LayoutError::Bounds { .. }), "{wrong:?}");
    }
}

#[test]
fn frame_that_claims_more_is_refused() {
    let hashes = [0; 8];
    for len in [8192, 1 << 20] {
        for coding in [Coding::Lz4, Coding::Zstd] {
            let frame = match coding {
                Coding::Zstd => zstd::bulk::compress(&vec![0; len], 3).unwrap(),
                _ => lz4_flex::block::compress(&vec![0; len]),
            };
            let stored = [&hashes[..], &frame].concat();
            let refused = decode_chunk(coding, &stored, 4096);
            assert_eq!(refused, Err(LayoutError::Frame { expected: 4096 }));
        }
    }
}

#[test]
fn manifests_of_another_kind_are_refused() {
    let right = serde_json::json!({
        "format": "demand-image",
        "version": 1,
        "image": { "size": 1 << 20, "chunk_size": 65536, "generation": "0f".repeat(16) },
        "index": {
            "sha256": "ab".repeat(32), "size": 4128 + 512, "head_size": 4128,
            "head_sha256": "cd".repeat(32),
        },
        "files": [{ "name": "state", "sha256": "ef".repeat(32), "size": 10 }],
        "chunks": { "stored": 1, "reused": 0 },
        "parent": null,
        "created": 0,
        "tool": "",
        "later": "unknown keys are passed over",
    });
    let parse = |value: &serde_json::Value| {
        let mut value = value.clone();
        value["checksum"] = "0".repeat(64).into();
        value["checksum"] = ObjectId::of(value.to_string().as_bytes()).to_string().into();
        Manifest::parse(value.to_string().as_bytes())
    };
    assert_eq!(parse(&right).unwrap().files.len(), 1);
    for (pointer, value) in [
        ("/format", "other".into()),
        ("/version", 2.into()),
        ("/image/size", 4095.into()),
        ("/image/size", u64::MAX.into()),
        ("/image/chunk_size", 65535.into()),
        ("/image/generation", "0f".into()),
        ("/index/size", 4127.into()),
        ("/index/size", (4128 + 513).into()),
        ("/index/head_size", 4129.into()),
        ("/index/head_size", u64::MAX.into()),
        ("/image/size", (1_u64 << 48).into()),
        ("/index/sha256", "AB".repeat(32).into()),
        ("/files/0/name", "../state".into()),
        ("/files/0/name", "memory".into()),
        ("/files/0/size", (1_u64 << 40).into()),
    ] {
        let mut wrong = right.clone();
        *wrong.pointer_mut(pointer).unwrap() = value;
        println!("{pointer}: {}", parse(&wrong).unwrap_err());
    }
    let mut encrypted = right.clone();
    encrypted["encryption"] = "key".into();
    println!("{}", parse(&encrypted).unwrap_err());
}

proptest! {
    #[test]
    fn random_bytes_are_refused(bytes in vec(any::<u8>(), 0..9000), len in 0_usize..300) {
        prop_assert!(Head::decode(&bytes).is_err());
        prop_assert!(Manifest::parse(&bytes).is_err());
        let (head, _) = index();
        prop_assert!(Block::decode(&bytes, &head, 0).is_err());
        for coding in CODINGS {
            prop_assert!(decode_chunk(coding, &bytes, len * 4096).is_err());
        }
    }

    #[test]
    fn sealed_changes_decode_within_bounds(
        changes in vec((0_usize..4400, any::<u8>()), 1..6),
        cut in 4096_usize..4400,
    ) {
        let mut bytes = index().0.encode();
        for (at, byte) in changes {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        bytes.truncate(cut);
        seal(&mut bytes);
        if let Ok(head) = Head::decode(&bytes) {
            // Whatever is accepted is encoded as it was.
            prop_assert_eq!(head.encode(), bytes);
            prop_assert!(head.packs.len() <= 10 && head.blocks.len() <= 10);
        }
    }

    #[test]
    fn sealed_blocks_keep_references_within_packs(
        changes in vec((0_usize..400, any::<u8>()), 1..40),
    ) {
        let (mut head, mut block) = index();
        for (at, byte) in changes {
            block[at] = byte;
        }
        head.blocks[0].as_mut().unwrap().digest = digest(&block);
        if let Ok(decoded) = Block::decode(&block, &head, 0) {
            for entry in decoded.entries().iter().flatten() {
                let pack = head.packs[entry.pack as usize];
                prop_assert!(entry.offset + entry.len <= pack.len && entry.ordinal < pack.chunks);
            }
        }
    }
}
