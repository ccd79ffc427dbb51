// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Records on the disk. The program remembers every write that the disk has confirmed, and reads it
//! back: at once, at random, and all of it at the end. This detects lost, repeated, misplaced and
//! torn writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_work::Journal as Kind;
use guest_work::Prove;
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::block::{Block, SIZE, step};
use crate::console::wrong;

/// The mount point of the file system.
pub(crate) const MOUNT: &str = "/mnt";
/// The journal's file in it.
const FILE: &str = "/mnt/journal";

/// State shared by the thread and its creator.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    records: AtomicU64,
}

/// The running work on the disk.
pub(crate) struct Journal {
    shared: Arc<Shared>,
    thread: JoinHandle<Store>,
}

impl Journal {
    /// Starts the work.
    ///
    /// # Errors
    ///
    /// The disk cannot be used.
    pub(crate) fn start(asked: &Prove) -> Result<Option<Self>> {
        if asked.journal == Kind::None {
            return Ok(None);
        }
        let mut store = Store::open(asked)?;
        let shared = Arc::new(Shared::default());
        let every = Duration::from_millis(asked.every_ms);
        let thread = thread::spawn({
            let shared = shared.clone();
            move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    store.record().unwrap_or_else(|why| wrong("journal", &format!("{why:#}")));
                    shared.records.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(every);
                }
                store
            }
        });
        Ok(Some(Self { shared, thread }))
    }

    /// Returns the number of records written, synced and read back so far.
    pub(crate) fn records(&self) -> u64 {
        self.shared.records.load(Ordering::Relaxed)
    }

    /// Stops, and verifies every record; on a file system, once more after a remount.
    pub(crate) fn finish(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let store = match self.thread.join() {
            Ok(store) => store,
            Err(_) => wrong("work", "the thread that writes records panicked"),
        };
        store.finish().unwrap_or_else(|why| wrong("journal", &format!("{why:#}")));
    }
}

/// The expected content of each slot.
struct Table {
    /// Distinguishes the records of this run from earlier content of the disk.
    run: u64,
    /// Number of the last record.
    number: u64,
    /// For each slot the number of the record that it must hold, or 0 for none.
    slots: Vec<u64>,
}

impl Table {
    fn new(run: u64, slots: u64) -> Self {
        Self { run, number: 0, slots: vec![0; slots as usize] }
    }

    /// Returns the next record and its slot.
    fn next(&mut self) -> (u64, usize) {
        self.number += 1;
        (self.number, self.any(0))
    }

    /// Returns a random slot; `which` selects one of several for each record.
    fn any(&self, which: u64) -> usize {
        (step(step(self.run ^ self.number) ^ which) >> 16) as usize % self.slots.len()
    }

    /// Checks that a block read from a slot is the one that it must hold.
    fn check(&self, slot: usize, block: &Block) -> Result<()> {
        let number = self.slots[slot];
        if number == 0 {
            return Ok(());
        }
        block
            .check([self.run, slot as u64, number])
            .map_err(|why| anyhow::anyhow!("slot {slot}, at {:#x}: {why}", slot * SIZE))
    }
}

/// The records' location, and their expected content.
struct Store {
    table: Table,
    path: String,
    device: String,
    kind: Kind,
    /// Goes through the page cache.
    cached: File,
    /// Bypasses it.
    direct: File,
}

impl Store {
    fn open(asked: &Prove) -> Result<Self> {
        let device = asked.device.clone();
        let path = match asked.journal {
            Kind::Ext4 => {
                mount_disk(&device)?;
                FILE.into()
            }
            Kind::Raw | Kind::None => device.clone(),
        };
        let (mut cached, direct) = open(&path, asked.journal == Kind::Ext4)?;
        let wanted = asked.slots * SIZE as u64;
        if asked.journal == Kind::Ext4 {
            cached.set_len(wanted).with_context(|| format!("{path} could not be made"))?;
        }
        let size = cached.seek(SeekFrom::End(0))?;
        ensure!(
            size >= wanted,
            "{path} has {size} bytes, and {} slots take {wanted}: ask for fewer (slots=N) or give a larger disk",
            asked.slots
        );
        let mut run = [0; 8];
        getrandom(&mut run, GetRandomFlags::empty())?;
        let table = Table::new(u64::from_le_bytes(run), asked.slots);
        Ok(Self { table, path, device, kind: asked.journal, cached, direct })
    }

    /// Writes and syncs a record, and reads it and another one back.
    fn record(&mut self) -> Result<()> {
        let (number, slot) = self.table.next();
        let mut block = Block::ZERO;
        block.fill([self.table.run, slot as u64, number]);
        self.cached
            .write_all_at(&block.0, (slot * SIZE) as u64)
            .and_then(|()| self.cached.sync_data())
            .with_context(|| format!("record {number} could not be written to {}", self.path))?;
        self.table.slots[slot] = number;
        self.verify(&self.direct, slot).context("just written")?;
        self.verify(&self.direct, self.table.any(1)).context("written before")?;
        self.verify(&self.cached, self.table.any(2)).context("through the page cache")
    }

    fn verify(&self, file: &File, slot: usize) -> Result<()> {
        let mut block = Block::ZERO;
        file.read_exact_at(&mut block.0, (slot * SIZE) as u64)
            .with_context(|| format!("slot {slot} of {} could not be read", self.path))?;
        self.table.check(slot, &block)
    }

    fn verify_all(&self) -> Result<()> {
        for slot in 0..self.table.slots.len() {
            self.verify(&self.direct, slot)?;
            self.verify(&self.cached, slot).context("through the page cache")?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.verify_all()?;
        if self.kind != Kind::Ext4 {
            return Ok(());
        }
        no_errors(&self.device)?;
        // A remounted file system has nothing in its caches.
        let nothing = File::open("/dev/null")?;
        self.cached = nothing.try_clone()?;
        self.direct = nothing;
        unmount(MOUNT, UnmountFlags::empty()).context("the disk could not be unmounted")?;
        mount_disk(&self.device)?;
        (self.cached, self.direct) = open(&self.path, false)?;
        self.verify_all().context("after the disk was mounted anew")?;
        no_errors(&self.device)?;
        drop((self.cached, self.direct));
        unmount(MOUNT, UnmountFlags::empty()).context("the disk could not be unmounted")
    }
}

fn open(path: &str, create: bool) -> Result<(File, File)> {
    let open = |flags: OFlags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
    };
    open(OFlags::empty())
        .and_then(|cached| Ok((cached, open(OFlags::DIRECT)?)))
        .with_context(|| format!("{path} could not be opened"))
}

fn mount_disk(device: &str) -> Result<()> {
    fs::create_dir_all(MOUNT)?;
    mount(device, MOUNT, "ext4", MountFlags::empty(), c"errors=remount-ro").with_context(|| {
        format!("{device} could not be mounted: journal=ext4 needs a disk that mkfs.ext4 made")
    })
}

/// Checks the file system's own count of errors, kept on the disk.
fn no_errors(device: &str) -> Result<()> {
    let name = Path::new(device).file_name().context("a disk has a name")?.display();
    let count = match fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count")) {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!("ext4 is not on {device}"),
        Err(error) => return Err(error.into()),
    };
    ensure!(count.trim() == "0", "ext4 counts {} errors on {device}", count.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_misplaced_writes_are_noticed() {
        let mut table = Table::new(77, 2);
        let record = |slot: u64, number| {
            let mut block = Block::ZERO;
            block.fill([77, slot, number]);
            block
        };
        // A slot that was never written may hold anything.
        assert!(table.check(1, &Block::ZERO).is_ok());
        table.slots = vec![1, 2];
        assert!(table.check(1, &record(1, 2)).is_ok());
        for other in [record(1, 1), record(0, 2), record(1, 3), Block::ZERO] {
            assert!(table.check(1, &other).is_err());
        }
    }

    #[test]
    fn all_slots_are_taken_at_random() {
        let mut table = Table::new(5, 16);
        let mut taken = [0; 16];
        for number in 1..=400 {
            let (next, slot) = table.next();
            assert_eq!(next, number);
            taken[slot] += 1;
        }
        assert!(taken.iter().all(|count| (5..60).contains(count)), "{taken:?}");
    }
}
