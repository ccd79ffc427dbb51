// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks behind virtio-mmio, driven as by a guest's driver, with real back-ends: used, reset,
//! stopped under load, saved, and resumed with other processes.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod attach;
mod driver;
mod resume;
mod silent;
mod stop;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, MemfdBacking, PageRange, PagerConfig, Retrier,
    RetryPolicy, Stats,
};
use demand_source::{LocalFile, PageSource};
use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::driver::{Driver, FLUSH, READ, WRITE};
use demand_tests::process::{Guarded, program};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use demand_vmm::config::VhostUserConfig;
use demand_vmm::config::device_kind::DeviceKind;
use test_support::wait::{listens, until};
use vm_memory::GuestAddress;

const MEMORY: u64 = 16 << 20;
const DISK_SECTORS: u64 = 32 << 10;
/// Start of the data, after the rings.
const DATA: u64 = 0x10_0000;

/// Creates guest memory from a source, all of it missing.
fn memory_of(source: Arc<dyn PageSource>) -> DemandMemory {
    let config = PagerConfig {
        backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, MEMORY).unwrap()),
        source,
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    DemandMemory::new(vec![DemandRegion::new(GuestAddress(0), config, ()).unwrap()]).unwrap()
}

fn memory(image: &Path) -> DemandMemory {
    memory_of(Arc::new(LocalFile::open(image).unwrap()))
}

fn fill(memory: &DemandMemory) {
    for pager in memory.pagers() {
        pager.fetch(PageRange::new(0, pager.pages()), demand_memory::FaultPath::Fill).unwrap();
    }
    until("memory is complete", || memory.pagers().all(|p| p.bitmap().is_complete()));
}

fn service() -> Arc<FaultService> {
    Arc::new(FaultService::start(DEFAULT_THREADS).unwrap())
}

/// A disk's image, a memory image of numbered pages, and a folder for sockets.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        let sector = |n: u64| n.to_le_bytes().repeat(64);
        fs::write(place.disk(), (0..DISK_SECTORS).flat_map(sector).collect::<Vec<_>>()).unwrap();
        // Each page holds its number; the rings' are zeros, as a driver allocates them.
        let mut image = File::create(place.image()).unwrap();
        image.set_len(MEMORY).unwrap();
        image.seek(SeekFrom::Start(DATA)).unwrap();
        let page = |n: u64| (n | 0xabcd << 48).to_le_bytes().repeat(512);
        image.write_all(&(DATA / 4096..MEMORY / 4096).flat_map(page).collect::<Vec<_>>()).unwrap();
        place
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("memory")
    }

    /// Starts a back-end process of the project with `queues` queues.
    fn back_end(&self, queues: u16) -> BackEnd {
        let options = BlkOptions { queues, queue_size: 256, postcopy: true };
        BackEnd::vhost_device_blk(self.folder.path(), &self.disk(), &options).unwrap()
    }

    /// Starts a back-end that serves the disk read-only.
    fn read_only(&self, queues: u16) -> (Guarded, PathBuf) {
        let socket = self.folder.path().join("read-only.sock");
        let mut command = Command::new(program("vhost-device-blk").unwrap());
        command
            .arg("--socket-path")
            .arg(&socket)
            .arg("--blk-file")
            .arg(self.disk())
            .arg("--read-only");
        let process = Guarded::spawn(command.arg("--num-queues").arg(queues.to_string())).unwrap();
        until("the back-end listens", || listens(process.id()));
        (process, socket)
    }

    fn qemu(&self) -> BackEnd {
        BackEnd::qemu_storage_daemon(self.folder.path(), &self.disk()).unwrap()
    }
}

fn disk_of(back_end: &BackEnd, queues: u16) -> VhostUserConfig {
    VhostUserConfig { queues, ..VhostUserConfig::new(DeviceKind::Blk, back_end.socket()) }
}

/// Makes a request of each kind, and checks its visible effects.
fn use_disk(driver: &mut Driver<'_>, disk: &Path, sector: u64, mark: u64) {
    driver.request(READ, sector, DATA + 0x3000, 4096);
    assert_eq!(driver.word(DATA + 0x3000 + 512), sector + 1);
    driver.put(DATA + 0x8000, mark);
    driver.request(WRITE, sector + 100, DATA + 0x8000, 4096);
    driver.request(FLUSH, 0, 0, 0);
    let bytes = fs::read(disk).unwrap();
    let at = (sector as usize + 100) * 512;
    assert_eq!(bytes[at..at + 8], mark.to_le_bytes());
}
