// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests with a real back-end in another process, whose faults on missing memory are served.

mod common;

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::process::{self, NOTHING, Process, expect, expect_blocked};
use common::{HIGH, Memory, PAGES, address_of};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, PAGE_SIZE, PageRange, to_usize,
};
use demand_uffd::{ArmedMapping, FaultService, Features, Userfaultfd};
use demand_vhost::{BackEnd, ErrorKind, Options, VhostUserProtocolFeatures, Vring};
use test_support::host::huge_pages;
use test_support::wait::{A_WHILE, PATIENCE, until};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Not a test: the entry point of the back-end's process.
#[test]
fn back_end() {
    process::run_if_asked();
}

fn service(threads: usize) -> Arc<FaultService> {
    Arc::new(FaultService::start(threads).unwrap())
}

fn connect(process: &Process, memory: &Memory, service: &Arc<FaultService>) -> BackEnd {
    let mut back_end = BackEnd::connect(&process.socket, Options::default()).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    back_end.share_missing_memory(&memory.memory, service).unwrap();
    back_end
}

struct Ring {
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn new() -> Self {
        Ring { kick: EventFd::new(0).unwrap(), call: EventFd::new(0).unwrap() }
    }

    fn set(&self, back_end: &mut BackEnd) -> demand_vhost::Result<()> {
        // The whole ring lies in page 5, which is a hole of the image, so it is empty.
        let page = 5 * PAGE_SIZE;
        let vring = Vring {
            size: 16,
            descriptors: GuestAddress(page),
            available: GuestAddress(page + 0x400),
            used: GuestAddress(page + 0x800),
            next_available: 0,
            kick: &self.kick,
            call: &self.call,
        };
        back_end.set_vring(0, &vring, true)
    }
}

fn memory_arrives(kind: BackingKind) {
    let memory = Memory::new(kind);
    let service = service(2);
    let process = Process::start();
    let mut back_end = connect(&process, &memory, &service);
    assert_eq!(back_end.queues(), 1);
    let mut config = [0; 4];
    back_end.read_config(8, &mut config).unwrap();
    assert_eq!(config, [8, 9, 10, 11]);
    back_end.write_config(0, &[1, 2]).unwrap();
    back_end.check().unwrap();

    // Units that are partly present because of a vCPU's faults.
    let pagers = memory.pagers();
    for page in [1, 7, 511, 600] {
        pagers[0].fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    until("they arrive", || !pagers[0].bitmap().is_missing(600));
    process.expect(7 * PAGE_SIZE);
    process.expect(8 * PAGE_SIZE + 8);
    process.expect(600 * PAGE_SIZE);
    process.expect(HIGH + 4088);

    let ring = Ring::new();
    ring.set(&mut back_end).unwrap();
    ring.kick.write(1).unwrap();
    assert!(ring.call.read().unwrap() >= 1, "the back-end serves the queue");

    let reads: Vec<_> = (0..2 * PAGES)
        .step_by(7)
        .map(|page| address_of((page * 31) % (2 * PAGES)) + 16)
        .map(|address| (address, process.read(address)))
        .collect();
    reads.iter().for_each(|(address, read)| expect(read, *address));
    assert_eq!(back_end.stop_vring(0).unwrap(), 0);

    memory.fill();
    back_end.end_postcopy().unwrap();
    for page in (0..2 * PAGES).step_by(3) {
        process.expect(address_of(page));
    }
    service.finish().unwrap();
    let report = memory.stats.path(FaultPath::BackEnd);
    assert_eq!(report.granularity_bytes, 2 << 20, "{report:?}");
    assert!(report.faults >= 4 && report.faults <= 12, "{report:?}");
}

#[test]
fn memory_arrives_as_it_is_touched() {
    memory_arrives(BackingKind::Shmem);
}

#[test]
fn huge_pages_arrive_as_they_are_touched() {
    let Some(_pool) = huge_pages(6) else { return };
    memory_arrives(BackingKind::Hugetlb2M);
}

#[test]
fn config_changes_are_delivered_only_if_negotiated() {
    for (unused, told) in [
        (VhostUserProtocolFeatures::empty(), true),
        (VhostUserProtocolFeatures::BACKEND_REQ, false),
    ] {
        let process = Process::start();
        let options = Options::default().unused(unused);
        let mut back_end = BackEnd::connect(&process.socket, options).unwrap();
        assert_eq!(back_end.on_config_change(|| ()).unwrap(), told);
        back_end.write_config(0, &[1]).unwrap();
        let hang_up = back_end.hang_up();
        hang_up.check().unwrap();
        drop(back_end);
        assert!(hang_up.check().is_err(), "a handle keeps no connection open");
    }
}

/// The back-end answers SET_VRING_ADDR only when the ring's page is present. Faults are served
/// meanwhile, by a single thread.
#[test]
fn queue_waiting_for_its_ring_delays_no_fault() {
    let memory = Memory::new(BackingKind::Shmem);
    let service = service(1);
    let process = Process::start();
    let mut back_end = connect(&process, &memory, &service);
    memory.control.hold([511]);
    let (sender, set) = mpsc::channel();
    let setter = thread::spawn(move || {
        let set = Ring::new().set(&mut back_end);
        sender.send(()).unwrap();
        set.map(|()| back_end)
    });
    let waiting = process.read(PAGE_SIZE);
    expect_blocked(&waiting);
    process.expect(513 * PAGE_SIZE);
    process.expect(HIGH + 8);
    assert!(set.recv_timeout(A_WHILE).is_err(), "the ring has not arrived");
    memory.control.release();
    let back_end = setter.join().unwrap().unwrap();
    expect(&waiting, PAGE_SIZE);
    back_end.check().unwrap();
}

#[test]
fn hang_up_ends_a_blocked_request() {
    let memory = Memory::new(BackingKind::Shmem);
    let service = service(1);
    let process = Process::start();
    let mut back_end = connect(&process, &memory, &service);
    memory.control.hold([511]);
    let hang_up = back_end.hang_up();
    let setter = thread::spawn(move || Ring::new().set(&mut back_end));
    thread::sleep(A_WHILE);
    assert!(!setter.is_finished());
    hang_up.hang_up();
    let error = setter.join().unwrap().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Disconnected), "{error}");
    memory.control.release();
}

/// Returns the CPU time used so far by each thread of the fault services, in ticks of 10 ms.
fn ticks_of_services() -> Vec<(String, u64)> {
    let task = |task: std::io::Result<std::fs::DirEntry>| {
        let path = task.ok()?.path();
        // The thread's name is in parentheses; user and system time are fields 14 and 15.
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        let (name, fields) = stat.rsplit_once(')')?;
        let fields: Vec<_> = fields.split_whitespace().collect();
        let ticks = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
        name.contains("(uffd-").then(|| (path.display().to_string(), ticks))
    };
    std::fs::read_dir("/proc/self/task").unwrap().filter_map(task).collect()
}

/// Back-ends die while they wait for a page: others are still served, and no thread spins.
#[test]
fn dead_back_end_delays_no_other() {
    let memory = Memory::new(BackingKind::Shmem);
    let service = service(2);
    let mut mortals = [Process::start(), Process::start()];
    let survivor = Process::start();
    let [first, second] = mortals.each_ref().map(|process| connect(process, &memory, &service));
    let mut other = connect(&survivor, &memory, &service);
    memory.control.hold([511]);
    let dead = mortals.each_ref().map(|process| process.read(PAGE_SIZE));
    let alive = survivor.read(PAGE_SIZE);
    dead.iter().for_each(expect_blocked);
    expect_blocked(&alive);
    mortals.iter_mut().for_each(Process::kill);
    for back_end in [&first, &second] {
        until("its end is seen", || back_end.check().is_err());
    }
    let before = ticks_of_services();
    thread::sleep(Duration::from_millis(600));
    for (thread, ticks) in ticks_of_services() {
        let then = before.iter().find(|(name, _)| *name == thread).map_or(ticks, |(_, then)| *then);
        assert!(ticks - then < 30, "a thread used {} of 60 ticks", ticks - then);
    }
    survivor.expect(600 * PAGE_SIZE);
    memory.control.release();
    expect(&alive, PAGE_SIZE);
    drop(first);
    survivor.expect(HIGH + 600 * PAGE_SIZE);
    memory.fill();
    other.end_postcopy().unwrap();
    // The second `BackEnd` is not dropped, so the service does not know that its process has ended.
    service.finish().unwrap();
    drop(second);
}

/// Two back-ends and an armed mapping of this process access the same memory at once.
#[test]
fn all_processes_read_the_same() {
    let memory = Memory::new(BackingKind::Shmem);
    let service = service(2);
    let processes = [Process::start(), Process::start()];
    let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
    let pagers = memory.pagers();
    let guest = Arc::new(pagers[0].backing().map().unwrap());
    let armed = ArmedMapping::own(&uffd, guest.clone(), &pagers[0], FaultPath::Guest).unwrap();
    pagers[0].set_guest_trap(armed.clone()).unwrap();
    service.add(&[armed]).unwrap();
    let mut back_ends: Vec<_> =
        processes.iter().map(|process| connect(process, &memory, &service)).collect();
    let reads: Vec<_> = (0..600)
        .map(|n| address_of(n * 1237 % (2 * PAGES)) + 8 * (n % 512))
        .flat_map(|address| processes.iter().map(move |process| (address, process.read(address))))
        .collect();
    for page in (0..PAGES).rev() {
        // SAFETY: the word lies in the mapping, and no thread writes it after it is present.
        let word = unsafe { guest.at(page * PAGE_SIZE).cast::<u64>().as_ptr().read_volatile() };
        assert_eq!(word, common::word_of(page * PAGE_SIZE), "page {page}");
    }
    reads.iter().for_each(|(address, read)| expect(read, *address));
    memory.fill();
    back_ends.iter_mut().for_each(|back_end| back_end.end_postcopy().unwrap());
    service.finish().unwrap();
    assert!(uffd.is_closed());
    for page in 0..2 * PAGES {
        processes[to_usize(page % 2)].expect(address_of(page) + 2048);
    }
}

#[test]
fn present_memory_needs_no_service() {
    let memory = Memory::new(BackingKind::Shmem);
    memory.fill();
    let process = Process::start();
    let mut back_end = BackEnd::connect(&process.socket, Options::default()).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    let ring = Ring::new();
    let early = ring.set(&mut back_end).unwrap_err();
    assert!(matches!(early.kind(), ErrorKind::Order { .. }), "{early}");
    back_end.share_present_memory(&memory.memory).unwrap();
    let outside = Vring {
        size: 16,
        descriptors: GuestAddress(common::SIZE),
        available: GuestAddress(0),
        used: GuestAddress(0),
        next_available: 0,
        kick: &ring.kick,
        call: &ring.call,
    };
    let error = back_end.set_vring(0, &outside, true).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::VringAddress { address: common::SIZE, .. }),
        "{error}"
    );
    ring.set(&mut back_end).unwrap();
    ring.kick.write(1).unwrap();
    assert!(ring.call.read().unwrap() >= 1);
    for page in (0..2 * PAGES).step_by(37) {
        process.expect(address_of(page));
    }
}

/// Memory, its low part, and its high region.
fn split(kind: BackingKind) -> (Memory, DemandMemory, Arc<DemandRegion>) {
    let memory = Memory::new(kind);
    let (low, high) = memory.memory.remove_region(GuestAddress(HIGH), common::SIZE).unwrap();
    (memory, low, high)
}

fn expect_nothing(process: &Process, address: u64) {
    assert_eq!(process.read(address).recv_timeout(PATIENCE), Ok(NOTHING));
}

/// Regions that are partly present come to a running back-end, and go.
fn regions_come_and_go(kind: BackingKind) {
    let (memory, low, high) = split(kind);
    let service = service(1);
    let process = Process::start();
    let mut back_end = BackEnd::connect(&process.socket, Options::default()).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    let early = back_end.insert_region(&*high).unwrap_err();
    assert!(matches!(early.kind(), ErrorKind::Order { .. }), "{early}");
    back_end.share_missing_memory(&low, &service).unwrap();
    let pages = [0, 511, 512, 514, PAGES - 1];
    for _ in 0..3 {
        let (_memory, _, high) = split(kind);
        expect_nothing(&process, HIGH);
        // As by vCPUs' faults.
        let partly = PageRange::new(511, 3);
        high.pager().fetch(partly, FaultPath::Guest).unwrap();
        until("they arrive", || high.pager().bitmap().first_missing(partly).is_none());
        back_end.insert_region(&*high).unwrap();
        pages.iter().for_each(|page| process.expect(HIGH + page * PAGE_SIZE + 8));
        let again = back_end.insert_region(&*high).unwrap_err();
        assert!(matches!(again.kind(), ErrorKind::RegionOverlap { .. }), "{again}");
        back_end.remove_region(GuestAddress(HIGH)).unwrap();
        high.pager().stop();
        expect_nothing(&process, HIGH);
        let gone = back_end.remove_region(GuestAddress(HIGH)).unwrap_err();
        assert!(matches!(gone.kind(), ErrorKind::NoRegion { address: HIGH }), "{gone}");
    }
    process.expect(PAGE_SIZE);
    back_end.insert_region(&*high).unwrap();
    let early = back_end.end_postcopy().unwrap_err();
    assert!(matches!(early.kind(), ErrorKind::Incomplete { .. }), "{early}");
    memory.fill();
    back_end.end_postcopy().unwrap();
    service.finish().unwrap();
    pages.iter().for_each(|page| process.expect(HIGH + page * PAGE_SIZE));
    // After post-copy only complete regions come.
    back_end.remove_region(GuestAddress(HIGH)).unwrap();
    expect_nothing(&process, HIGH);
    let (_other, _, missing) = split(kind);
    let late = back_end.insert_region(&*missing).unwrap_err();
    assert!(matches!(late.kind(), ErrorKind::Incomplete { missing: PAGES }), "{late}");
    back_end.insert_region(&*high).unwrap();
    pages.iter().for_each(|page| process.expect(HIGH + page * PAGE_SIZE));
}

#[test]
fn regions_of_running_back_end_come_and_go() {
    regions_come_and_go(BackingKind::Shmem);
}

#[test]
fn huge_regions_come_and_go() {
    let Some(_pool) = huge_pages(12) else { return };
    regions_come_and_go(BackingKind::Hugetlb2M);
}

#[test]
fn back_end_without_slots_keeps_its_memory() {
    let (_memory, low, high) = split(BackingKind::Shmem);
    let process = Process::start();
    let options = Options::default().unused(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let mut back_end = BackEnd::connect(&process.socket, options).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    back_end.share_missing_memory(&low, &service(1)).unwrap();
    for refused in [
        back_end.expect_mem_slots(),
        back_end.insert_region(&*high),
        back_end.remove_region(GuestAddress(0)),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NoMemSlots), "{error}");
        assert!(error.to_string().contains("--mem-slots on"), "{error}");
    }
    process.expect(PAGE_SIZE);
    expect_nothing(&process, HIGH);
}
