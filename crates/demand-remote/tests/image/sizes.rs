// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests and bytes that opening and a fault take.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use demand_remote::image::{Push, RemoteImage};
use demand_source::{LocalFile, PageSource};

use crate::support::{GENERATION, PAGE, Place, Random, read, records};

#[test]
fn tebibyte_opens_in_one_mebibyte() {
    let place = Place::new();
    let path = place.path("large");
    let file = fs::File::create(&path).unwrap();
    let size = 1_u64 << 40;
    file.set_len(size).unwrap();
    let places = [0, 5 << 30, 700 << 30, size - PAGE as u64];
    for at in places {
        file.write_all_at(&[7; PAGE], at).unwrap();
    }
    let image = LocalFile::open(&path).unwrap();
    let state = place.path("state");
    fs::write(&state, vec![1; 60 << 10]).unwrap();
    let begun = Instant::now();
    let push = Push::new(&image, GENERATION).file("state", &state);
    let summary = push.run(&place.store, "vm", &mut |_| true).unwrap();
    let pushed = begun.elapsed();
    assert_eq!((summary.chunks.stored, summary.packs), (4, 1));
    let begun = Instant::now();
    let image = RemoteImage::open(&place.store, "vm").unwrap();
    let (opened, took) = (image.stats(), begun.elapsed());
    println!("pushed in {pushed:?}; opened in {took:?} with {opened:?}");
    assert!(opened.bytes <= 1 << 20, "{opened:?}");
    assert_eq!(opened.requests, 3, "manifest; index and side file");
    for at in places {
        let mut page = vec![0xee; PAGE];
        image.read_through(at, &mut (&mut page[..]).into()).unwrap();
        assert_eq!(page, [7; PAGE]);
    }
    println!("read four pages with {:?}", image.stats());
    assert!(image.extent_now(1 << 30).unwrap().unwrap().is_hole());
    let hole = image.extent(100 << 30).unwrap();
    assert!(hole.is_hole() && hole.end() > 105 << 30, "{hole:?}");
}

#[test]
fn fault_costs_one_small_request() {
    let place = Place::new();
    let mut content = vec![0; 4 << 20];
    records(&mut content, &mut Random::new(40));
    place.push("vm", &content, |push| push).unwrap();
    let image = place.open("vm");
    let opened = image.stats();
    println!("opened with {opened:?}");
    let (mut faults, mut last) = (0, opened);
    for chunk in (0..content.len()).step_by(64 << 10) {
        let at = chunk + (chunk >> 4) % (64 << 10) / PAGE * PAGE;
        assert!(read(&image, at, PAGE).unwrap() == content[at..at + PAGE]);
        let now = image.stats();
        assert_eq!(now.requests, last.requests + 1);
        assert!(now.bytes - last.bytes <= 32 << 10, "{} bytes", now.bytes - last.bytes);
        (faults, last) = (faults + 1, now);
    }
    println!("{faults} faults read {} bytes each", (last.bytes - opened.bytes) / faults);
}

#[test]
fn blocks_of_the_index_come_as_touched() {
    let place = Place::new();
    // Chunks of 16 KiB: a block for each 32 MiB, of 64 KiB; eight are in the first request.
    let path = place.path("large");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    for block in 0..32 {
        file.write_all_at(&[1; PAGE], block << 25).unwrap();
    }
    let image = LocalFile::open(&path).unwrap();
    let push = Push::new(&image, GENERATION).chunk_size(16 << 10);
    push.run(&place.store, "vm", &mut |_| true).unwrap();
    let image = RemoteImage::open(&place.store, "vm").unwrap();
    let opened = image.stats();
    assert!(image.extent_now(31 << 25).is_none(), "the block is not known yet");
    assert!(!image.extent(31 << 25).unwrap().is_hole());
    assert!(image.extent_now(31 << 25).is_some());
    let before = image.stats();
    assert_eq!(before.requests, opened.requests + 1, "both looks share a request");
    std::thread::scope(|scope| {
        for page in 0..8 {
            let image = &image;
            scope.spawn(move || {
                let right: &[u8] = if page == 0 { &[1; PAGE] } else { &[0; PAGE] };
                assert_eq!(read(image, (20 << 25) + page * PAGE, PAGE).unwrap(), right);
            });
        }
    });
    let after = image.stats();
    println!(
        "opened with {opened:?}; first faults of a block took it from {before:?} to {after:?}"
    );
    assert_eq!(after.requests, before.requests + 2, "one block and one chunk");
}
