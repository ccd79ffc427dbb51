// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Damaged objects are errors, and never other content.

use std::fs;
use std::os::unix::fs::FileExt;

use demand_remote::image::{Compression, Push, RemoteImage, verify};
use demand_source::{LocalFile, PageSource};

use crate::support::{GENERATION, PAGE, Place, Random, mixed, read};

const CHUNK: usize = 16 << 10;

/// Outcomes of reads from a damaged store.
#[derive(Debug, Default)]
struct Seen {
    damages: usize,
    refused_open: usize,
    refused_read: usize,
    /// Reads that were refused before anything was decoded.
    refused_by_digest: usize,
    refused_file: usize,
    unnoticed_by_reads: usize,
}

impl Seen {
    /// Reads all there is, and checks that nothing wrong is delivered.
    fn check(&mut self, place: &Place, content: &[u8], what: &str) {
        self.damages += 1;
        let mut noticed = false;
        match RemoteImage::open(&place.store, "vm") {
            Err(_) => {
                self.refused_open += 1;
                noticed = true;
            }
            Ok(image) => {
                assert_eq!(image.size(), content.len() as u64);
                let wrong = (0..content.len()).step_by(CHUNK).filter(|at| {
                    let len = CHUNK.min(content.len() - at);
                    let read = read(&image, *at, len);
                    let right = &content[*at..at + len];
                    assert!(
                        read.as_ref().is_ok_and(|read| read == right) || read.is_err(),
                        "{what}"
                    );
                    let extent = image.extent(*at as u64);
                    let zero = right.iter().all(|byte| *byte == 0);
                    assert!(extent.is_ok_and(|extent| extent.is_hole() == zero), "{what}");
                    if let Err(error) = &read {
                        let digest = error.to_string().contains("digest of the stored chunk");
                        self.refused_by_digest += usize::from(digest);
                    }
                    read.is_err()
                });
                let wrong = wrong.count();
                self.refused_read += usize::from(wrong > 0);
                let file = image.file("state");
                assert!(
                    file.is_err() || file.is_ok_and(|file| file == b"the VM's state"),
                    "{what}"
                );
                let refused_file = image.file("state").is_err();
                self.refused_file += usize::from(refused_file);
                noticed |= wrong > 0 || refused_file;
            }
        }
        self.unnoticed_by_reads += usize::from(!noticed);
        assert!(verify(&place.store, "vm", &mut |_| true).is_err(), "verify sees nothing: {what}");
    }
}

fn prepared() -> (Place, Vec<u8>) {
    let place = Place::new();
    let content = mixed(12 * CHUNK + 5 * PAGE, 12);
    let compressions = [Compression::Lz4, Compression::Zstd(1)];
    let with = compressions[content.len() % 2];
    place.push("vm", &content, |push| push.chunk_size(16 << 10).compression(with)).unwrap();
    (place, content)
}

#[test]
fn flipped_bits_are_noticed() {
    let (place, content) = prepared();
    let mut random = Random::new(13);
    for object in place.objects() {
        let bytes = fs::read(&object).unwrap();
        let mut seen = Seen::default();
        // Small objects and the head of the index bit by bit, the rest in strides.
        let step = (bytes.len() / 400).max(1);
        let in_head = object.parent().unwrap().ends_with("index");
        let mut places: Vec<_> = (0..bytes.len()).step_by(step).collect();
        if in_head {
            places.extend((0..160).chain(4096..bytes.len()));
        }
        for at in places {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << random.below(8);
            fs::write(&object, damaged).unwrap();
            seen.check(&place, &content, &format!("byte {at} of {}", object.display()));
        }
        fs::write(&object, &bytes).unwrap();
        println!("{:?}, {} bytes: {seen:?}", object.parent().unwrap().file_name(), bytes.len());
        // Only the gaps between the chunks of a pack are never read.
        let packs = object.parent().unwrap().ends_with("packs");
        assert!(packs || seen.unnoticed_by_reads == 0, "{seen:?}");
        // The decoder never sees other bytes than the writer's.
        assert_eq!(seen.refused_by_digest, seen.refused_read, "{seen:?}");
    }
    assert_eq!(read(&place.open("vm"), 0, content.len()).unwrap(), content);
}

#[test]
fn truncated_objects_are_noticed() {
    let (place, content) = prepared();
    for object in place.objects() {
        let bytes = fs::read(&object).unwrap();
        let mut seen = Seen::default();
        let lens = (0..bytes.len()).step_by((bytes.len() / 60).max(1)).chain([bytes.len() - 1]);
        for len in lens {
            fs::write(&object, &bytes[..len]).unwrap();
            seen.check(&place, &content, &format!("{len} bytes of {}", object.display()));
        }
        assert_eq!(seen.unnoticed_by_reads, 0, "{}", object.display());
        fs::remove_file(&object).unwrap();
        seen.check(&place, &content, &format!("no {}", object.display()));
        fs::write(&object, &bytes).unwrap();
        println!("{:?}, {} bytes: {seen:?}", object.parent().unwrap().file_name(), bytes.len());
    }
}

#[test]
fn damage_of_later_blocks_is_noticed() {
    let place = Place::new();
    // More than the first request reads of the index: 32 blocks of 64 KiB.
    let path = place.path("large");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    for block in 0..32 {
        file.write_all_at(&[1; PAGE], block << 25).unwrap();
    }
    let image = LocalFile::open(&path).unwrap();
    let push = Push::new(&image, GENERATION).chunk_size(16 << 10);
    push.run(&place.store, "vm", &mut |_| true).unwrap();
    let index =
        place.objects().into_iter().find(|object| object.parent().unwrap().ends_with("index"));
    let index = index.unwrap();
    let mut bytes = fs::read(&index).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    fs::write(&index, &bytes).unwrap();

    let image = place.open("vm");
    assert_eq!(read(&image, 30 << 25, PAGE).unwrap(), [1; PAGE]);
    for _ in 0..2 {
        let error = read(&image, 31 << 25, PAGE).unwrap_err();
        println!("{error}");
        assert!(image.extent_now(31 << 25).is_none());
        assert!(image.extent(31 << 25).is_err());
    }
    // Once the object is restored, the next read succeeds.
    bytes[at] ^= 1;
    fs::write(&index, &bytes).unwrap();
    assert_eq!(read(&image, 31 << 25, PAGE).unwrap(), [1; PAGE]);
}

#[test]
fn swapped_chunks_are_noticed() {
    // Two chunks of the same length and coding, in each other's place.
    let place = Place::new();
    let mut content = vec![1; 4 * CHUNK];
    content[CHUNK..2 * CHUNK].fill(2);
    place
        .push("vm", &content, |push| push.chunk_size(16 << 10).compression(Compression::None))
        .unwrap();
    let object = place.objects()[0].clone();
    let mut bytes = fs::read(&object).unwrap();
    let stored = CHUNK + CHUNK / PAGE * 8;
    let (first, second) = bytes[..2 * stored].split_at_mut(stored);
    first.swap_with_slice(second);
    fs::write(&object, &bytes).unwrap();
    let image = place.open("vm");
    for at in [0, CHUNK] {
        let error = read(&image, at, PAGE).unwrap_err();
        println!("{error}");
    }
    assert_eq!(read(&image, 2 * CHUNK, PAGE).unwrap(), [1; PAGE]);
}
