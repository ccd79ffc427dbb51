// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads through a cache, by readers of one process; and helpers of the other tests.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use demand_remote::image::{Compression, RemoteImage, RemoteOptions};
use demand_remote::{CacheStats, HostCache};
use demand_source::{Chunk, Destination, PageSource, Priority, Request};
use test_support::wait::until;

use crate::support::{PAGE, Place, Random, check_content, noise, read};

/// Size of the images' chunks, in bytes.
pub(crate) const CHUNK: usize = 16 << 10;
/// A size that the tests' images do not exceed, in bytes.
pub(crate) const ROOMY: u64 = 1 << 30;

/// Returns content of so many chunks, none of which is all zeros or like another one.
pub(crate) fn distinct(chunks: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut content = vec![0; chunks * CHUNK];
    for chunk in content.chunks_mut(CHUNK) {
        // The last page stays zeros, which is what a hole of the cache's file reads as.
        noise(&mut chunk[..CHUNK - PAGE], &mut random);
    }
    content
}

/// Pushes content as the snapshot `name`.
pub(crate) fn push(place: &Place, name: &str, content: &[u8]) {
    let with = Compression::Lz4;
    place.push(name, content, |push| push.chunk_size(16 << 10).compression(with)).unwrap();
}

/// Opens an image that keeps nothing in memory, so that each read reaches the cache.
pub(crate) fn open(place: &Place, name: &str, cache: &HostCache) -> RemoteImage {
    let options = RemoteOptions { recent_bytes: 0, ..RemoteOptions::default() };
    RemoteImage::open_cached(&place.store, name, options, cache.clone()).unwrap()
}

/// Reads all of an image through a newly opened cache and checks it. Returns the number of requests
/// for chunks and the use of the cache, once all chunks that are written have been.
pub(crate) fn read_all(
    place: &Place,
    name: &str,
    cache: &Path,
    content: &[u8],
) -> (u64, CacheStats) {
    let cache = HostCache::open(cache, ROOMY).unwrap();
    let image = open(place, name, &cache);
    let before = image.stats().requests;
    check_content(&image, content);
    let requests = image.stats().requests - before;
    until("the chunks are not written", || cache.stats().written_bytes >= requests * CHUNK as u64);
    (requests, cache.stats())
}

/// Returns the files of the packs in a cache.
pub(crate) fn files(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cache.join("packs-v1")) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Returns the space that the files of a cache occupy, in bytes.
pub(crate) fn used(cache: &Path) -> u64 {
    files(cache).iter().filter_map(|file| fs::metadata(file).ok()).map(|it| it.blocks() * 512).sum()
}

#[test]
fn second_reader_makes_no_request() {
    let place = Place::new();
    let content = distinct(40, 1);
    push(&place, "vm", &content);
    let cache = place.path("cache");
    let (requests, stats) = read_all(&place, "vm", &cache, &content);
    println!("first: {requests} requests, {stats:?}");
    assert_eq!((requests, stats.misses, stats.overdue), (40, 40, 0));
    let (requests, stats) = read_all(&place, "vm", &cache, &content);
    println!("second: {requests} requests, {stats:?}");
    assert_eq!((requests, stats.misses, stats.written_bytes), (0, 0, 0));
    assert_eq!(stats.hit_bytes, content.len() as u64);
    assert_eq!(files(&cache).len(), 1);
}

#[test]
fn images_share_their_common_chunks() {
    let place = Place::new();
    let mut content = distinct(40, 2);
    push(&place, "first", &content);
    content[7 * CHUNK..8 * CHUNK].fill(9);
    let with = Compression::Lz4;
    place
        .push("second", &content, |push| {
            push.chunk_size(16 << 10).compression(with).parent("first")
        })
        .unwrap();
    let cache = place.path("cache");
    content[7 * CHUNK..8 * CHUNK].copy_from_slice(&distinct(40, 2)[7 * CHUNK..8 * CHUNK]);
    assert_eq!(read_all(&place, "first", &cache, &content).0, 40);
    content[7 * CHUNK..8 * CHUNK].fill(9);
    assert_eq!(read_all(&place, "second", &cache, &content).0, 1);
}

#[test]
fn readers_of_one_process_share_requests() {
    let place = Place::new();
    let content = distinct(60, 3);
    push(&place, "vm", &content);
    let cache = HostCache::open(place.path("cache"), ROOMY).unwrap();
    let images: Vec<_> = (0..4).map(|_| open(&place, "vm", &cache)).collect();
    let before: u64 = images.iter().map(|image| image.stats().requests).sum();
    std::thread::scope(|scope| {
        for image in &images {
            scope.spawn(|| check_content(image, &content));
        }
    });
    let requests: u64 = images.iter().map(|image| image.stats().requests).sum();
    println!("{} requests, {:?}", requests - before, cache.stats());
    assert_eq!(requests - before, 60 + cache.stats().overdue);
}

#[test]
fn cached_page_is_read_at_once() {
    let place = Place::new();
    let content = distinct(4, 4);
    push(&place, "vm", &content);
    // In memory, where no read waits.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    read_all(&place, "vm", folder.path(), &content);
    let cache = HostCache::open(folder.path(), ROOMY).unwrap();
    let image = open(&place, "vm", &cache);
    let mut page = [0; PAGE];
    let at = CHUNK + PAGE;
    let read_now = |page: &mut [u8]| image.read_now(at as u64, &mut Destination::from(page));
    // No file is open yet, and opening one may wait.
    assert!(read_now(&mut page).is_none());
    read(&image, 0, PAGE).unwrap();
    read_now(&mut page).unwrap().unwrap();
    assert!(page == content[at..at + PAGE]);
    // A range over two chunks, whose bounds are no pages'.
    let mut bytes = vec![0; PAGE + 1000];
    image.read_now(CHUNK as u64 - 500, &mut Destination::from(&mut bytes[..])).unwrap().unwrap();
    assert!(bytes == content[CHUNK - 500..][..PAGE + 1000]);
}

#[test]
fn fill_is_kept_as_well() {
    let place = Place::new();
    let content = distinct(30, 5);
    push(&place, "vm", &content);
    let cache = HostCache::open(place.path("cache"), ROOMY).unwrap();
    let image = open(&place, "vm", &cache);
    let (destination, bytes) = Destination::owned(vec![0; content.len()]);
    let chunks = vec![Chunk { offset: 0, destination }];
    image.submit(Request { priority: Priority::Fill, chunks }).wait().unwrap();
    assert!(bytes.take().unwrap() == content);
    let all = content.len() as u64;
    until("the chunks are not written", || cache.stats().written_bytes >= all);
    assert_eq!(read_all(&place, "vm", &place.path("cache"), &content).0, 0);
}
