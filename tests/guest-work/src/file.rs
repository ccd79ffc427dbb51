// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A large file that is written once, then read repeatedly through a page cache from which it is
//! dropped each time. So the disk writes into memory all over the machine, which the guest has not
//! touched since it was freed.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_work::Prove;
use rustix::fs::{Advice, OFlags, fadvise};
use rustix::io::pwritev;

use crate::block::{Block, SIZE};
use crate::console::wrong;
use crate::journal::MOUNT;

/// The third word of a block, which marks it as content of the file.
const CONTENT: u64 = 0x656c_6966;
/// Number of blocks in one read or write: 1 MiB.
const BATCH: u64 = 256;

/// The running work on the file.
pub(crate) struct LargeFile {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Content>,
}

impl LargeFile {
    /// Writes the file, on the file system that the journal has mounted, and starts to read it,
    /// with a pause after each batch.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn start(asked: &Prove) -> Result<Option<Self>> {
        if asked.file == 0 {
            return Ok(None);
        }
        let content = Content::create(&Path::new(MOUNT).join("file"), asked.file)?;
        let stop = Arc::new(AtomicBool::new(false));
        let rest = Duration::from_micros(asked.rest_us);
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                let reading = || {
                    thread::sleep(rest);
                    !stop.load(Ordering::Relaxed)
                };
                while !stop.load(Ordering::Relaxed) {
                    content
                        .verify(reading)
                        .unwrap_or_else(|why| wrong("file", &format!("{why:#}")));
                }
                content
            }
        });
        Ok(Some(Self { stop, thread }))
    }

    /// Stops, and verifies the file from its first block to its last.
    pub(crate) fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let Ok(content) = self.thread.join() else {
            wrong("work", "the thread that reads the file panicked")
        };
        content.verify(|| true).unwrap_or_else(|why| wrong("file", &format!("{why:#}")));
    }
}

/// The file, and its number of blocks.
struct Content {
    file: File,
    blocks: u64,
}

impl Content {
    /// Writes it past the page cache, so that later reads come from the disk.
    fn create(path: &Path, bytes: u64) -> Result<Self> {
        let written = || format!("{} of {bytes} bytes could not be written", path.display());
        let mut batch = vec![Block::ZERO; BATCH as usize];
        let flags = OFlags::DIRECT.bits().cast_signed();
        let direct = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags)
            .open(path)
            .with_context(written)?;
        let blocks = bytes / SIZE as u64;
        for first in (0..blocks).step_by(BATCH as usize) {
            for (block, number) in batch.iter_mut().zip(first..) {
                block.fill([number, 0, CONTENT]);
            }
            let slices: Vec<_> = batch.iter().map(|block| IoSlice::new(&block.0)).collect();
            let count = pwritev(&direct, &slices, first * SIZE as u64).with_context(written)?;
            ensure!(count == batch.len() * SIZE, "{}: the disk is full", written());
        }
        direct.sync_all().with_context(written)?;
        let file = File::open(path).with_context(written)?;
        Ok(Self { file, blocks })
    }

    /// Reads it from the disk and verifies each block, for as long as `may_continue`, which is called
    /// after each batch, returns true.
    fn verify(&self, may_continue: impl Fn() -> bool) -> Result<()> {
        // None of its pages is dirty: this drops all of them.
        fadvise(&self.file, 0, None, Advice::DontNeed).context("the page cache was not dropped")?;
        let mut block = Block::ZERO;
        for first in (0..self.blocks).step_by(BATCH as usize) {
            for number in first..first + BATCH {
                self.file
                    .read_exact_at(&mut block.0, number * SIZE as u64)
                    .with_context(|| format!("block {number} could not be read"))?;
                block
                    .check([number, 0, CONTENT])
                    .map_err(|why| anyhow::anyhow!("block {number}: {why}"))?;
            }
            if !may_continue() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn altered_block_is_noticed() {
        let path = std::env::temp_dir().join(format!("guest-work-file-{}", std::process::id()));
        let content = Content::create(&path, 2 << 20).expect("there is room");
        assert!(content.verify(|| true).is_ok());
        let file = OpenOptions::new().write(true).open(&path).expect("is there");
        let last = (2 << 20) - 1;
        file.write_all_at(&[0x40], last).expect("can be written");
        let why = content.verify(|| true).unwrap_err().to_string();
        std::fs::remove_file(&path).expect("is there");
        assert!(why.starts_with("block 511: 1 bytes are not"), "{why}");
        // Only the first batch was requested.
        assert!(content.verify(|| false).is_ok());
    }
}
