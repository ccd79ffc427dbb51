// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks behind virtio-mmio, driven as by a guest's driver, with real back-ends: used, reset,
//! stopped under load, saved, and resumed with other processes.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, MemfdBacking, PageRange, RegionConfig, Retrier,
    RetryPolicy, Stats,
};
use demand_source::{LocalFile, PageSource};
use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::driver::{Driver, FLUSH, READ, Ring, WRITE};
use demand_tests::host;
use demand_tests::process::{Guarded, program};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::config::{Lazy, VhostUserOption};
use demand_vmm::virtio::mmio::WINDOW;
use demand_vmm::virtio::state::DeviceState;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, kvm_irqchip};
use test_support::image;
use test_support::wait::{listens, until};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 16 << 20;
const DISK_SECTORS: u64 = 32 << 10;
/// Start of the data, after the rings.
const DATA: u64 = 0x10_0000;

const NEEDS_RESET: u32 = 64;

/// Creates guest memory from a source, all of it missing.
fn memory_of(source: Arc<dyn PageSource>) -> DemandMemory {
    let config = RegionConfig {
        start: GuestAddress(0),
        backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, MEMORY, true).unwrap()),
        source,
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    DemandMemory::new(vec![DemandRegion::new(config, ()).unwrap()]).unwrap()
}

fn memory(image: &Path) -> DemandMemory {
    memory_of(Arc::new(LocalFile::open(image).unwrap()))
}

fn fill(memory: &DemandMemory) {
    for pager in memory.pagers() {
        pager.fetch(PageRange::new(0, pager.pages()), demand_memory::Path::Fill).unwrap();
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
        command.arg("--socket").arg(&socket).arg("--disk").arg(self.disk()).arg("--read-only");
        let process = Guarded::spawn(command.arg("--num-queues").arg(queues.to_string())).unwrap();
        until("the back-end listens", || listens(process.id()));
        (process, socket)
    }

    fn qemu(&self) -> BackEnd {
        BackEnd::qemu_storage_daemon(self.folder.path(), &self.disk()).unwrap()
    }
}

fn disk_of(back_end: &BackEnd, queues: u16) -> VhostUserOption {
    VhostUserOption { queues, ..VhostUserOption::new(DeviceKind::Blk, back_end.socket()) }
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

#[test]
fn driver_uses_disk_and_sets_up_again() {
    let place = Place::new();
    let back_end = place.back_end(2);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 2), 3).unwrap();
    assert_eq!((device.name(), device.kind()), ("blk3", DeviceKind::Blk));
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 2);
    driver.set_up();
    assert_eq!(driver.config::<8>(0), DISK_SECTORS.to_le_bytes());
    assert_eq!(driver.config::<2>(34), 2u16.to_le_bytes());
    assert_eq!(driver.get(0x60), 1, "interrupts are always about queues");
    for round in 1..=3 {
        use_disk(&mut driver, &place.disk(), 8 * round, 0x1111 * round);
        // The back-end writes missing pages to the disk.
        assert!(driver.submit(1, WRITE, 2000, DATA + 0x10_0000 * round, 8192));
        driver.finish();
        let written = fs::read(place.disk()).unwrap()[2000 * 512..][..8].to_vec();
        let page = (DATA + 0x10_0000 * round) / 4096;
        assert_eq!(written, (page | 0xabcd << 48).to_le_bytes());
        // The driver can write the state of the write cache, and nothing else.
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[0]);
        device.mmio_write(MmioAddress(0), 0x100, &[0; 8]);
        assert_eq!((driver.config::<1>(32), driver.config::<2>(0)), ([0], [0, 128]));
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[1]);
        driver.set_up();
    }
    let interrupt = device.interrupts().next().unwrap();
    assert!(interrupt.read().is_ok(), "the back-end has raised it");
    fill(&memory);
    device.end_postcopy().unwrap();
    use_disk(&mut driver, &place.disk(), 999, 0x5555);
    device.check_alive().unwrap();
    back_end.terminate().unwrap();
    until("its end is seen", || device.check_alive().is_err());
    let error = device.can_snapshot().unwrap_err().to_string();
    assert!(error.starts_with("device blk3: ") && error.contains("closed the connection"));
}

#[test]
fn driver_with_wrong_rings_is_told_to_reset() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.prepare();
    driver.set_up_queue(0, 0);
    driver.set(0x70, 15);
    assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "no memory was shared yet");
    device.share_memory(&memory, &service()).unwrap();
    // Past the end, across the end, unaligned, and where addresses wrap around.
    for base in [MEMORY, MEMORY - 0x1004, 0x1001, u64::MAX - 0xfff] {
        driver.prepare();
        driver.set_up_queue(0, base);
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "{base:#x}");
        assert_eq!(driver.get(0x60) & 2, 2, "it is told");
        driver.set(0x64, 2);
        assert_eq!(driver.get(0x60) & 2, 0);
    }
    driver.prepare();
    driver.set(0x38, 512);
    driver.set(0x44, 1);
    driver.set(0x70, 15);
    assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "a queue of no size");
    // A driver that has set FAILED can use the device again.
    driver.prepare();
    driver.set(0x70, 128);
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 5, 7);
}

/// DRIVER_OK without negotiated features, with each feature that the back-end offers and the device
/// does not, and with features that the driver withdraws at the last moment.
#[test]
fn driver_ok_needs_agreed_features() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    let offered = |driver: &Driver<'_>| {
        [0, 1].map(|half| {
            driver.set(0x14, half);
            driver.get(0x10)
        })
    };
    let accept = |driver: &Driver<'_>, [low, high]: [u32; 2]| {
        for (half, bits) in [(0, low), (1, high)] {
            driver.set(0x24, half);
            driver.set(0x20, bits);
        }
    };
    let refused = |driver: &Driver<'_>, what: &str| {
        assert_eq!(driver.get(0x70) & NEEDS_RESET, NEEDS_RESET, "{what}");
        assert_eq!(driver.get(0x60) & 2, 2, "it is told: {what}");
        let kick = device.interrupts().last().unwrap();
        assert!(kick.read().is_ok(), "it is interrupted: {what}");
        // The back-end was given no queue.
        driver.set(0x50, 0);
        assert_eq!(driver.word(0x2000), 0, "no request is answered: {what}");
    };
    // Nothing negotiated, and then features that must not be: LOG_ALL, PROTOCOL_FEATURES,
    // ACCESS_PLATFORM, packed rings, legacy.
    let log_and_protocol = 1 << 26 | 1 << 30;
    for (what, agree, low, high) in [
        ("FEATURES_OK was never set", 0, 0, 1),
        ("a feature below was not offered", 8, log_and_protocol, 1),
        ("a feature above was not offered", 8, 0, 1 | 1 << 1 | 1 << 2),
        ("a legacy driver", 8, 0, 0),
    ] {
        driver.set(0x70, 0);
        driver.set(0x70, 3);
        accept(&driver, [low, high]);
        driver.set(0x70, 3 | agree);
        assert_eq!(driver.get(0x70), 3, "{what}");
        // The write cache depends on a feature that was not negotiated.
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[0]);
        assert_eq!(driver.config::<1>(32), [1], "{what}");
        driver.set_up_queue(0, 0);
        driver.set(0x70, 3 | agree | 4);
        refused(&driver, what);
        // Too late.
        accept(&driver, offered(&driver));
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70) & NEEDS_RESET, NEEDS_RESET, "{what}");
    }
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 5, 7);
    let agreed = device.quiesce(Duration::from_secs(10)).unwrap();
    drop((device, back_end));

    // An altered state: its features were not offered, or not negotiated.
    let text = serde_json::to_value(&agreed).unwrap();
    for (what, field, value) in [
        ("LOG_ALL", "driver_features", agreed.registers.driver_features() | 1 << 26),
        ("no VERSION_1", "driver_features", agreed.registers.driver_features() & !(1 << 32)),
        ("not agreed", "status", 7),
    ] {
        let mut altered = text.clone();
        altered["registers"][field] = value.into();
        let state: DeviceState = serde_json::from_value(altered).unwrap();
        let back_end = place.back_end(1);
        let error = VhostUserDevice::restore(&disk_of(&back_end, 1), 0, &state).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{what}: {error}");
    }
}

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
    let refused = |option: &VhostUserOption, words: &[&str]| {
        let error = VhostUserDevice::restore(option, 0, &state).unwrap_err().to_string();
        assert!(error.starts_with("device blk0: "), "{error}");
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    {
        let back_end = place.back_end(2);
        let rng = VhostUserOption::new(DeviceKind::Rng, back_end.socket());
        refused(&rng, &["of kind blk", "names rng"]);
    }
    refused(&disk_of(&place.back_end(1), 1), &["2 queues", "has 1"]);
    refused(&disk_of(&place.qemu(), 2), &["2 queues", "has 1"]);
    {
        // Read-only at the restore only: the driver could not have written to it otherwise.
        let (_process, socket) = place.read_only(2);
        let option = VhostUserOption::new(DeviceKind::Blk, socket);
        refused(&option, &["does not offer: DISCARD, WRITE_ZEROES;"]);
    }
    File::options().write(true).open(place.disk()).unwrap().set_len(1 << 20).unwrap();
    refused(&disk_of(&place.back_end(2), 2), &["capacity 32768", "2048"]);
    File::options().write(true).open(place.disk()).unwrap().set_len(DISK_SECTORS * 512).unwrap();
    let nobody = VhostUserOption::new(DeviceKind::Blk, place.folder.path().join("nobody"));
    refused(&nobody, &["start the back-end first"]);
    VhostUserDevice::restore(&disk_of(&place.back_end(4), 1), 0, &state).unwrap();
    let more = VhostUserDevice::connect(&disk_of(&place.back_end(2), 4), 0).unwrap_err();
    assert!(more.to_string().contains("lower queues="), "{more}");
}

/// Requests that wait for pages, from an unavailable source.
#[test]
fn disk_with_requests_in_flight_is_not_stopped() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let (source, control) = image::far(MEMORY);
    let _let_go = control.let_go_at_the_end();
    let held = DATA + (8 << 20);
    control.hold([held / 4096]);
    let memory = memory_of(Arc::new(source));
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    assert!(driver.submit(0, WRITE, 8, held, 4096));
    let error = device.quiesce(Duration::from_millis(200)).unwrap_err().to_string();
    for words in
        ["device blk0", "queue 0", "up to index 1", "answered up to 0", "retry when it is idle"]
    {
        assert!(error.contains(words), "{words}: {error}");
    }
    // Nothing was stopped.
    assert!(driver.submit(0, READ, 16, DATA, 512));
    until("another request is answered", || driver.reap(0) == 1);
    control.let_go();
    driver.finish();
    let bytes = fs::read(place.disk()).unwrap();
    assert_eq!(bytes[4096..4104], image::word_of(held).to_ne_bytes());
    assert_eq!(
        device.quiesce(Duration::from_secs(10)).unwrap().registers.queues()[0].next_available,
        2
    );
}

/// A paused vCPU may have made a request, but not kicked the device yet.
#[test]
fn disk_stops_between_request_and_kick() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    driver.request(READ, 8, DATA, 512);
    assert!(driver.leave(0, READ, 16, DATA + 4096, 512));
    let state = device.quiesce(Duration::from_secs(10)).unwrap();
    assert_eq!(state.registers.queues()[0].next_available, 2);
    driver.finish();
}

/// An interrupt may be lost between the stop of a back-end and the save of a guest: each is raised
/// once when the device resumes, even if the back-end has no answer.
#[test]
fn resumed_device_interrupts_once() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    driver.request(READ, 8, DATA, 512);
    device.quiesce(Duration::from_secs(10)).unwrap();
    for interrupt in device.interrupts() {
        let _ = interrupt.read();
        assert!(interrupt.read().is_err(), "nobody raises it while the device stands");
    }
    device.resume().unwrap();
    for interrupt in device.interrupts() {
        assert!(interrupt.read().is_ok(), "one may have been lost");
    }
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
        let option = VhostUserOption { lazy, ..disk_of(&qemu, 1) };
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
        let option = VhostUserOption { lazy: Lazy::Fill, ..disk_of(&qemu, 1) };
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

/// Returns the pending interrupts of a KVM's first interrupt controller: bits by number.
fn waiting_interrupts(vm: &kvm_ioctls::VmFd) -> u8 {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: the union holds the state of the chip that was requested, the PIC.
    unsafe { chip.chip.pic.irr }
}

/// Interrupts go through KVM, each device's on a separate line.
#[test]
fn devices_are_attached_to_a_vm() {
    if !host::has_kvm() {
        return host::skip("there is no usable /dev/kvm");
    }
    let places = [Place::new(), Place::new()];
    let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
    {
        let back_end = places[0].back_end(2);
        let device = VhostUserDevice::connect(&disk_of(&back_end, 2), 0).unwrap();
        let error = device.attach(&vm, 0xd000_0000, 5).unwrap_err().to_string();
        assert!(error.contains("interrupt 5") && error.contains("KVM_CREATE_IRQCHIP"), "{error}");
    }
    vm.create_irq_chip().unwrap();
    let mut bus = IoManager::new();
    let devices = [0, 1].map(|n: u32| {
        let back_end = places[n as usize].back_end(2);
        let device = VhostUserDevice::connect(&disk_of(&back_end, 2), n as usize).unwrap();
        let address = 0xd000_0000 + WINDOW * u64::from(n);
        device.attach(&vm, address, 4 + n).unwrap();
        let device = Arc::new(device);
        let range = MmioRange::new(MmioAddress(address), WINDOW).unwrap();
        bus.register_mmio(range, device.clone()).unwrap();
        (device, back_end)
    });
    let mut magic = [0; 4];
    bus.mmio_read(MmioAddress(0xd000_1000), &mut magic).unwrap();
    assert_eq!(&magic, b"virt");
    let memory = memory(&places[1].image());
    let (device, _back_end) = &devices[1];
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(device, &memory, 2);
    driver.set_up();
    assert_eq!(waiting_interrupts(&vm), 0);
    use_disk(&mut driver, &places[1].disk(), 3, 4);
    until("KVM has the interrupt", || waiting_interrupts(&vm) == 1 << 5);
}
