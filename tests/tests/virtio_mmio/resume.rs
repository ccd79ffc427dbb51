// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A saved disk that resumes with another back-end, and the back-ends that it refuses.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use demand_memory::DemandMemory;
use demand_tests::driver::{Driver, Ring, WRITE};
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::config::{Lazy, VhostUserConfig};
use demand_vmm::virtio::state::DeviceState;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use vm_memory::{Bytes, GuestAddress};

use crate::{DATA, DISK_SECTORS, MEMORY, Place, disk_of, fill, memory, service, use_disk};

/// The requests of the load: writes of self-describing pages, each to a different place.
struct Load {
    next: u64,
}

impl Load {
    const LEN: u32 = 64 << 10;
    const COUNT: u64 = (MEMORY - DATA) / Self::LEN as u64;

    fn place(n: u64) -> (u64, u64) {
        (n * u64::from(Self::LEN) / 512, DATA + n * u64::from(Self::LEN))
    }

    /// Submits until the queues are full, or until all requests are submitted.
    fn submit(&mut self, driver: &mut Driver<'_>) {
        for queue in (0..driver.rings.len()).cycle() {
            let (sector, data) = Load::place(self.next);
            if self.next == Load::COUNT || !driver.submit(queue, WRITE, sector, data, Load::LEN) {
                return;
            }
            self.next += 1;
        }
    }

    fn check(disk: &Path) {
        let bytes = fs::read(disk).unwrap();
        for n in 0..Load::COUNT {
            let (sector, data) = Load::place(n);
            for page in 0..u64::from(Load::LEN) / 4096 {
                let at = (sector * 512 + page * 4096) as usize;
                let expected = (data / 4096 + page) | 0xabcd << 48;
                assert_eq!(bytes[at..at + 8], expected.to_le_bytes(), "write {n}, page {page}");
            }
        }
    }
}

/// Saves the current content of memory, as a snapshot does.
fn save(memory: &DemandMemory, path: &Path) {
    let mut bytes = vec![0; MEMORY as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The disk is repeatedly stopped under load, and each time resumed by a new process on missing
/// memory; each request is answered once, and each write is on the disk.
#[test]
fn disk_resumes_with_another_back_end() {
    let place = Place::new();
    let mut load = Load { next: 0 };
    let mut saved: Option<(DeviceState, Vec<Ring>)> = None;
    let mut left = 0;
    for round in 0..6 {
        let back_end = place.back_end(2);
        let option = disk_of(&back_end, if round == 0 { 2 } else { 1 });
        let memory = memory(&place.image());
        let service = service();
        let device = match &saved {
            None => VhostUserDevice::connect(&option, 0),
            Some((state, _)) => VhostUserDevice::restore(&option, 0, state),
        };
        let device = device.unwrap();
        device.share_memory(&memory, &service).unwrap();
        let mut driver = Driver::new(&device, &memory, 2);
        match saved.take() {
            None => driver.set_up(),
            Some((_, rings)) => {
                driver.rings = rings;
                // Requests that were not taken need no kick from the driver.
                device.resume().unwrap();
                for interrupt in device.interrupts() {
                    assert!(interrupt.read().is_ok(), "one may have been lost");
                }
                driver.finish();
            }
        }
        load.submit(&mut driver);
        // In this VM it resumes after a snapshot, and is then stopped once more.
        if round % 2 == 1 {
            device.quiesce(Duration::from_secs(10)).unwrap();
            device.resume().unwrap();
        }
        let state = device.quiesce(Duration::from_secs(10)).unwrap();
        // A kick for these reached no back-end.
        (0..2).for_each(|queue| _ = driver.reap(queue));
        if round % 3 != 0 {
            load.submit(&mut driver);
        }
        for queue in 0..2 {
            let (ring, stopped) = (&driver.rings[queue], &state.registers.queues()[queue]);
            assert_eq!(ring.last_used, stopped.next_available, "what was taken is answered");
            left += ring.pending.len();
        }
        let text = serde_json::to_string(&state).unwrap();
        saved = Some((serde_json::from_str(&text).unwrap(), driver.rings.clone()));
        save(&memory, &place.image());
        drop(device);
        back_end.terminate().unwrap();
    }
    assert!(left > 0, "nothing was ever left for the next");
    let (state, rings) = saved.unwrap();
    let back_end = place.back_end(2);
    let (memory, service) = (memory(&place.image()), service());
    let device = VhostUserDevice::restore(&disk_of(&back_end, 2), 0, &state).unwrap();
    device.share_memory(&memory, &service).unwrap();
    device.resume().unwrap();
    let mut driver = Driver::new(&device, &memory, 2);
    driver.rings = rings;
    while load.next < Load::COUNT || driver.rings.iter().any(|ring| !ring.pending.is_empty()) {
        load.submit(&mut driver);
        driver.finish();
    }
    Load::check(&place.disk());
    // The guest unbinds and binds its driver, which knows nothing of the restore.
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 31_000, 0x7777);
}

/// Returns the state of a disk that has been used.
fn state_of_disk(place: &Place, queues: u16) -> DeviceState {
    let back_end = place.back_end(queues);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, queues), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, queues.into());
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 1, 2);
    device.quiesce(Duration::from_secs(10)).unwrap()
}

#[test]
fn inferior_back_end_is_refused() {
    let place = Place::new();
    let state = state_of_disk(&place, 2);
    let refused = |option: &VhostUserConfig, words: &[&str]| {
        let error = VhostUserDevice::restore(option, 0, &state).unwrap_err().to_string();
        assert!(error.starts_with("device blk0: "), "{error}");
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    {
        let back_end = place.back_end(2);
        let rng = VhostUserConfig::new(DeviceKind::Rng, back_end.socket());
        refused(&rng, &["of kind blk", "names rng"]);
    }
    refused(&disk_of(&place.back_end(1), 1), &["2 queues", "has 1"]);
    refused(&disk_of(&place.qemu(), 2), &["2 queues", "has 1"]);
    {
        // Read-only at the restore only: the driver could not have written to it otherwise.
        let (_process, socket) = place.read_only(2);
        let option = VhostUserConfig::new(DeviceKind::Blk, socket);
        refused(&option, &["does not offer: DISCARD, WRITE_ZEROES;"]);
    }
    File::options().write(true).open(place.disk()).unwrap().set_len(1 << 20).unwrap();
    refused(&disk_of(&place.back_end(2), 2), &["capacity 32768", "2048"]);
    File::options().write(true).open(place.disk()).unwrap().set_len(DISK_SECTORS * 512).unwrap();
    let nobody = VhostUserConfig::new(DeviceKind::Blk, place.folder.path().join("nobody"));
    refused(&nobody, &["start the back-end first"]);
    VhostUserDevice::restore(&disk_of(&place.back_end(4), 1), 0, &state).unwrap();
    let more = VhostUserDevice::connect(&disk_of(&place.back_end(2), 4), 0).unwrap_err();
    assert!(more.to_string().contains("lower queues="), "{more}");
}

/// A back-end whose post-copy does not work sees complete memory only.
#[test]
fn foreign_back_end_needs_complete_memory() {
    let place = Place::new();
    let memory = memory(&place.image());
    let service = service();
    {
        let qemu = place.qemu();
        let device = VhostUserDevice::connect(&disk_of(&qemu, 1), 0).unwrap();
        let error = device.share_memory(&memory, &service).unwrap_err().to_string();
        assert!(error.contains("lazy=fill"), "{error}");
    }
    let refuse = |lazy: Lazy, words: &str| {
        let qemu = place.qemu();
        let option = VhostUserConfig { lazy, ..disk_of(&qemu, 1) };
        let device = VhostUserDevice::connect(&option, 0).unwrap();
        assert_eq!(device.wants_full_memory(), lazy == Lazy::Fill);
        let error = device.share_memory(&memory, &service).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refuse(Lazy::Refuse, "lazy=refuse");
    refuse(Lazy::Fill, "still missing");
    fill(&memory);
    let mut saved: Option<(DeviceState, Vec<Ring>)> = None;
    let mut load = Load { next: 0 };
    for round in 0..4 {
        let qemu = place.qemu();
        let option = VhostUserConfig { lazy: Lazy::Fill, ..disk_of(&qemu, 1) };
        let device = match &saved {
            None => VhostUserDevice::connect(&option, 0),
            Some((state, _)) => VhostUserDevice::restore(&option, 0, state),
        };
        let device = device.unwrap();
        device.share_memory(&memory, &service).unwrap();
        let mut driver = Driver::new(&device, &memory, 1);
        match saved.take() {
            None => {
                driver.set_up();
                use_disk(&mut driver, &place.disk(), 9, 0x99);
                driver.set_up();
            }
            Some((_, rings)) => {
                driver.rings = rings;
                device.resume().unwrap();
                driver.finish();
            }
        }
        load.submit(&mut driver);
        let state = device.quiesce(Duration::from_secs(10)).unwrap();
        driver.reap(0);
        assert_eq!(driver.rings[0].last_used, state.registers.queues()[0].next_available);
        saved = Some((state, driver.rings.clone()));
        assert!(driver.rings[0].pending.is_empty(), "round {round}");
        qemu.terminate().unwrap();
    }
}
