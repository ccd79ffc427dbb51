// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, pushes and comparisons that the tests share.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use demand_remote::Store;
use demand_remote::image::{ImageError, Push, PushSummary, RemoteImage};
use demand_source::{Destination, HashedImage, LocalFile, PageSource, SourceError};

pub(crate) const PAGE: usize = 4096;
pub(crate) const GENERATION: [u8; 16] = *b"sixteen bytes...";

/// A small generator of numbers, the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// Fills bytes with noise, which cannot be compressed.
pub(crate) fn noise(bytes: &mut [u8], random: &mut Random) {
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
    }
}

/// Fills bytes with records such as a heap has: pointers, small numbers, words.
pub(crate) fn records(bytes: &mut [u8], random: &mut Random) {
    const WORDS: [&[u8; 16]; 4] = [
        b"demand paging...",
        b"unsigned integer",
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"guest memory 4K.",
    ];
    for record in bytes.chunks_mut(64) {
        let mut content = [0; 64];
        let pointer = 0x7f12_0000_0000 + (random.next() & 0xff_fff8);
        content[..8].copy_from_slice(&pointer.to_le_bytes());
        content[8..12].copy_from_slice(&(random.next() & 0xffff).to_le_bytes()[..4]);
        content[16..32].copy_from_slice(WORDS[random.below(4)]);
        content[40..48].copy_from_slice(&random.next().to_le_bytes());
        record.copy_from_slice(&content[..record.len()]);
    }
}

/// Returns an image with holes, noise, records, and pages of zeros among data.
pub(crate) fn mixed(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut image = vec![0; len];
    let mut at = 0;
    while at < len {
        let end = len.min(at + (1 + random.below(96)) * PAGE);
        match random.below(4) {
            0 => noise(&mut image[at..end], &mut random),
            1 => records(&mut image[at..end], &mut random),
            _ => {}
        }
        at = end;
    }
    image
}

/// A folder with a store in it.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path().join("store")).unwrap();
        Place { folder, store }
    }

    /// Uses another store.
    pub(crate) fn with(store: Store) -> Self {
        Place { folder: tempfile::tempdir().unwrap(), store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn objects(&self) -> Vec<PathBuf> {
        objects(&self.path("store"))
    }

    /// Writes an image to a sparse file.
    pub(crate) fn image(&self, content: &[u8]) -> LocalFile {
        use std::os::unix::fs::FileExt;
        let path = self.path("image");
        let file = fs::File::create(&path).unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (page, bytes) in (0_u64..).zip(content.chunks(PAGE)) {
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, page * PAGE as u64).unwrap();
            }
        }
        LocalFile::open(&path).unwrap()
    }

    /// Pushes content with the options that `with` sets, and the side file `state`.
    pub(crate) fn push(
        &self,
        name: &str,
        content: &[u8],
        with: impl FnOnce(Push<'_>) -> Push<'_>,
    ) -> Result<PushSummary, ImageError> {
        self.push_beside(name, content, None, with)
    }

    /// Pushes content with a local copy of the parent's image.
    pub(crate) fn push_beside(
        &self,
        name: &str,
        content: &[u8],
        parent: Option<&HashedImage>,
        with: impl FnOnce(Push<'_>) -> Push<'_>,
    ) -> Result<PushSummary, ImageError> {
        let state = self.path("state");
        fs::write(&state, b"the VM's state").unwrap();
        let image = self.image(content);
        let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let push = Push::new(&image, GENERATION).created(created).file("state", state);
        let push = match parent {
            Some(parent) => push.parent_image(parent),
            None => push,
        };
        with(push).run(&self.store, name, &mut |_| true)
    }

    pub(crate) fn open(&self, name: &str) -> RemoteImage {
        RemoteImage::open(&self.store, name).unwrap()
    }
}

/// Returns the objects of a store in the order in which a push writes them.
pub(crate) fn objects(store: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for folder in ["packs", "index", "state", "snapshots"] {
        let Ok(entries) = fs::read_dir(store.join(folder)) else { continue };
        let mut here: Vec<_> = entries
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.metadata().unwrap().modified().unwrap(), entry.path()))
            .collect();
        here.sort();
        all.extend(here.into_iter().map(|(_, path)| path));
    }
    all
}

pub(crate) fn read(
    image: &dyn PageSource,
    offset: usize,
    len: usize,
) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0xee; len];
    image.read_through(offset as u64, &mut Destination::from(&mut bytes[..]))?;
    Ok(bytes)
}

/// Checks that an image has this content, and zeros up to the end of its last page.
pub(crate) fn check_content(image: &RemoteImage, content: &[u8]) {
    assert_eq!(image.size(), content.len().next_multiple_of(PAGE) as u64);
    let size = usize::try_from(image.size()).unwrap();
    for at in (0..size).step_by(1 << 20) {
        let bytes = read(image, at, (size - at).min(1 << 20)).unwrap();
        let right = &content[at.min(content.len())..(at + bytes.len()).min(content.len())];
        assert!(bytes[..right.len()] == *right, "wrong bytes near {at}");
        assert!(bytes[right.len()..].iter().all(|byte| *byte == 0));
    }
}
