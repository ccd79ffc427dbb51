// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, and sources of them that answer later or fail.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use demand_source::{
    Completer, Completion, Destination, Extent, ImageWriter, LocalFile, MissingPages, OtherSources,
    PageSource, Priority, Request, Retry, SourceError,
};

pub const PAGE: u64 = 4096;
/// More than a piece of the table, which covers 32 MiB.
pub const SIZE: u64 = 40 << 20;

/// A file that another thread reads, which can be made to fail.
pub struct Far {
    file: LocalFile,
    asked: mpsc::Sender<(Request, Completer)>,
    counts: Arc<Counts>,
}

#[derive(Default)]
pub struct Counts {
    pub reads: AtomicU64,
    pub raised: AtomicU64,
    /// Requests with a fault's priority.
    pub demanded: AtomicU64,
    pub fails: AtomicBool,
    /// The other sources of the image.
    pub others: Mutex<Option<OtherSources>>,
    pub missing: Mutex<Vec<MissingPages>>,
    /// No request is answered while it is locked.
    pub gate: Mutex<()>,
}

impl Far {
    pub fn open(path: &Path) -> (Arc<Far>, Arc<Counts>) {
        let (asked, requests) = mpsc::channel::<(Request, Completer)>();
        let counts = Arc::new(Counts::default());
        let (reader, state) = (LocalFile::open(path).unwrap(), counts.clone());
        thread::spawn(move || {
            for (request, completer) in requests {
                drop(state.gate.lock());
                if state.fails.load(Ordering::Acquire) {
                    let error = SourceError::other("the server is away", Retry::Later);
                    drop(request);
                    completer.complete(Err(error));
                    continue;
                }
                state.reads.fetch_add(1, Ordering::AcqRel);
                completer.complete(reader.submit(request).wait());
            }
        });
        let file = LocalFile::open(path).unwrap();
        (Arc::new(Far { file, asked, counts: counts.clone() }), counts)
    }
}

impl PageSource for Far {
    fn size(&self) -> u64 {
        self.file.size()
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size() })
    }
    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let is_demand = request.priority == Priority::Demand;
        self.counts.demanded.fetch_add(is_demand.into(), Ordering::AcqRel);
        self.asked.send((request, completer)).unwrap();
        completion
    }
    fn raise(&self, _: u64, _: u64) {
        self.counts.raised.fetch_add(1, Ordering::AcqRel);
    }
    fn set_others(&self, others: OtherSources) {
        *self.counts.others.lock().unwrap() = Some(others);
    }
    fn share_missing(&self, missing: &MissingPages) {
        self.counts.missing.lock().unwrap().push(missing.clone());
    }
}

pub struct Image {
    _folder: tempfile::TempDir,
    pub memory: PathBuf,
    pub hashes: PathBuf,
    pub content: Vec<u8>,
}

/// Writes an image in which every third page is a hole.
pub fn write() -> Image {
    let folder = tempfile::tempdir().unwrap();
    let (memory, hashes) = (folder.path().join("memory"), folder.path().join("hashes"));
    let mut content = vec![0; SIZE as usize];
    for (page, bytes) in (0u64..).zip(content.chunks_exact_mut(PAGE as usize)) {
        if page % 3 != 2 {
            bytes[..8].copy_from_slice(&(page + 1).to_le_bytes());
        }
    }
    let mut writer = ImageWriter::create(&memory, &hashes, SIZE, [5; 16]).unwrap();
    for (index, bytes) in (0u64..).zip(content.chunks(1 << 20)) {
        writer.write(index << 20, bytes).unwrap();
    }
    writer.finish().unwrap();
    Image { _folder: folder, memory, hashes, content }
}

pub fn read(source: &dyn PageSource, offset: u64, len: usize) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0; len];
    source.read_through(offset, &mut Destination::from(&mut bytes[..]))?;
    Ok(bytes)
}
