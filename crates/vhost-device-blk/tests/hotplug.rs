// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory regions that come and go while the device runs, with demand-vhost as its front-end.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::Arc;
use std::thread;

use common::*;
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, MemfdBacking, PAGE_SIZE, PageRange,
    PagerConfig,
};
use demand_uffd::FaultService;
use demand_vhost::{BackEnd, Options, Vring};
use test_support::image::{Control, far, page_of};
use test_support::wait::A_WHILE;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

/// Guest address of the region that comes and goes.
const PLUGGED: u64 = BASE + REGION;
/// Number of pages of each region.
const PAGES: u64 = REGION / PAGE_SIZE;
/// The bit of the log for migrations.
const LOG_ALL: u64 = 1 << 26;

/// Creates a region whose content is the `index`th part of the image, all of it missing.
fn region(start: u64, index: u64) -> (Arc<DemandRegion>, Arc<Control>) {
    let (source, control) = far(REGION * (index + 1));
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, REGION).unwrap());
    let config = PagerConfig::new(backing, Arc::new(source));
    let config = PagerConfig { image_offset: REGION * index, ..config };
    (Arc::new(DemandRegion::new(GuestAddress(start), config, ()).unwrap()), control)
}

/// The device, its queue, and the region of the queue's rings.
struct Plugged {
    daemon: Daemon,
    back_end: BackEnd,
    service: Arc<FaultService>,
    memory: DemandMemory,
    ring: Ring,
}

impl Plugged {
    fn start() -> Self {
        let daemon = Daemon::start(4096, &["--mem-slots", "on"]);
        let (first, _) = region(BASE, 0);
        let memory = DemandMemory::default().insert_region(first).unwrap();
        let service = Arc::new(FaultService::start(1).unwrap());
        let mut back_end = BackEnd::connect(daemon.socket(), Options::default()).unwrap();
        let features = back_end.features() & !LOG_ALL;
        back_end.set_features(features).unwrap();
        back_end.share_missing_memory(&memory, &service).unwrap();
        let ring = Ring::new(&memory, 0, features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let vring = Vring {
            size: QUEUE_SIZE,
            descriptors: GuestAddress(ring.desc_addr(0)),
            available: GuestAddress(ring.avail_addr()),
            used: GuestAddress(ring.used_addr()),
            next_available: 0,
            kick: &ring.kick,
            call: &ring.call,
        };
        back_end.set_vring(0, &vring, true).unwrap();
        Plugged { daemon, back_end, service, memory, ring }
    }

    /// Carries out a request with data in the region that comes and goes; returns its status.
    fn request(&mut self, kind: u32, sector: u64, offset: u64, len: u32) -> u8 {
        let head = self.ring.submit(&self.memory, kind, sector, &[(PLUGGED + offset, len)]);
        self.answer(head)
    }

    fn answer(&mut self, head: u16) -> u8 {
        assert_eq!(self.ring.wait(&self.memory).0, u32::from(head));
        self.ring.status(&self.memory, head)
    }

    /// Returns these pages' worth of the disk, from its first sector on.
    fn disk(&self, pages: u64) -> Vec<u8> {
        self.daemon.disk()[..(pages * PAGE_SIZE) as usize].to_vec()
    }
}

/// Returns the content of pages of the image.
fn content(pages: std::ops::Range<u64>) -> Vec<u8> {
    pages.flat_map(page_of).collect()
}

#[test]
fn device_uses_regions_that_come_and_go() {
    need_userfaultfd!();
    let mut vm = Plugged::start();
    assert_eq!(vm.request(T_OUT, 0, 0, 4096), IOERR);
    for round in 1..=3 {
        let (plugged, _control) = region(PLUGGED, round);
        let pager = plugged.pager();
        // As by a vCPU: a chunk that is partly present is not seen as zeros.
        pager.fetch(PageRange::page(3), FaultPath::Guest).unwrap();
        vm.back_end.insert_region(&plugged).unwrap();
        let guest = vm.memory.insert_region(plugged.clone()).unwrap();
        // The device reads missing pages, across a chunk's end.
        let first = round * PAGES;
        for from in [1, 510] {
            assert_eq!(vm.request(T_OUT, 0, from * PAGE_SIZE, 4 * 4096), OK);
            assert!(vm.disk(4) == content(first + from..first + from + 4), "page {from}");
        }
        assert!(pager.bitmap().is_missing(1024), "only what is used arrives");
        // It writes the middle of a missing page.
        assert_eq!(vm.request(T_IN, 100, 1501 * PAGE_SIZE + 1024, 512), OK);
        let mut page = vec![0; 4096];
        guest.read_slice(&mut page, GuestAddress(PLUGGED + 1501 * PAGE_SIZE)).unwrap();
        let mut expected = page_of(first + 1501);
        expected[1024..1536].fill(100);
        assert!(page == expected, "round {round}");

        vm.back_end.remove_region(GuestAddress(PLUGGED)).unwrap();
        pager.stop();
        assert_eq!(vm.request(T_OUT, 0, 0, 4096), IOERR);
    }
    // The rest of post-copy is as if the regions had never been.
    let (last, _control) = region(PLUGGED, 1);
    vm.back_end.insert_region(&last).unwrap();
    for pager in vm.memory.pagers().chain([last.pager()]) {
        pager.ensure(PageRange::new(0, PAGES), FaultPath::Fill, &Default::default()).unwrap();
    }
    vm.back_end.end_postcopy().unwrap();
    vm.service.finish().unwrap();
    assert_eq!(vm.request(T_OUT, 0, 0, 8 * 4096), OK);
    assert!(vm.disk(8) == content(PAGES..PAGES + 8));
    assert_eq!(vm.daemon.stderr(), "");
}

/// A request that waits for a page of the region gets it, although the region is being removed.
#[test]
fn removal_waits_for_requests_in_a_fault() {
    need_userfaultfd!();
    let mut vm = Plugged::start();
    let (plugged, control) = region(PLUGGED, 1);
    let _release = control.release_at_the_end();
    vm.back_end.insert_region(&plugged).unwrap();
    control.hold([PAGES + 8]);
    let head = vm.ring.submit(&vm.memory, T_OUT, 0, &[(PLUGGED + 7 * PAGE_SIZE, 2 * 4096)]);
    thread::sleep(A_WHILE);
    let mut back_end = vm.back_end;
    let remover = thread::spawn(move || {
        back_end.remove_region(GuestAddress(PLUGGED)).unwrap();
        back_end
    });
    thread::sleep(A_WHILE);
    assert!(!remover.is_finished(), "a request waits for the region");
    control.release();
    vm.back_end = remover.join().unwrap();
    assert_eq!(vm.answer(head), OK);
    assert!(vm.disk(2) == content(PAGES + 7..PAGES + 9));
    vm.back_end.check().unwrap();
}
