// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault service on shared memory: real faults, with fast and slow sources.

mod common;

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use common::{
    base, check_page, expect, expect_blocked, mapping, pager, pager_on, read_later, uffd,
};
use demand_memory::{
    BackingKind, FaultPath, MapPresent, Mapping, PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier,
    RetryPolicy, VcpuTrap,
};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, Modes, ServiceError};
use linux_raw_sys::general as raw;
use test_support::image::{Broken, far};
use test_support::wait::{A_WHILE, PATIENCE, until};

/// Two and a half chunks of the size that another process maps.
const PAGES: u64 = 1280;
const SIZE: u64 = PAGES * PAGE_SIZE;
const CHUNK: u64 = 512;

fn shmem() -> Arc<Pager> {
    pager(BackingKind::Shmem, SIZE)
}

fn service(threads: usize, mappings: &[Arc<ArmedMapping>]) -> FaultService {
    let service = FaultService::start(threads).unwrap();
    service.add(mappings).unwrap();
    service
}

/// Returns an endless sequence of pseudo-random numbers.
fn random(mut seed: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        Some(seed)
    })
}

#[test]
fn all_pages_arrive_one_by_one() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    assert_eq!(armed.granularity(), PAGE_SIZE);
    let service = service(DEFAULT_THREADS, &[armed]);
    for page in (0..PAGES).rev() {
        check_page(&mapping, page);
    }
    assert!(pager.bitmap().is_complete());
    service.finish().unwrap();
    assert!(uffd.is_closed());
    let report = pager.stats().path(FaultPath::Vmm);
    assert_eq!((report.faults, report.pages), (PAGES, PAGES));
    assert_eq!(report.granularity_histogram, [(PAGE_SIZE, PAGES)].into());
    assert!(report.latency_us.p50 > 0.0);
}

/// One read of the service returns at most a batch of messages.
#[test]
fn more_faults_than_one_batch_are_served() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let offsets = || (0..50).map(|page| page * PAGE_SIZE);
    let readers: Vec<_> = offsets().map(|offset| read_later(&mapping, offset)).collect();
    expect_blocked(readers.last().expect("there are some"));
    let _service = service(1, &[armed]);
    readers.iter().zip(offsets()).for_each(|(reader, offset)| expect(reader, offset));
}

#[test]
fn the_guests_mapping_is_mapped_by_the_pager() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
    pager.set_guest_trap(armed.clone()).unwrap();
    // No service runs yet, but fetched pages can be read.
    pager.fetch(PageRange::new(0, 100), FaultPath::Fill).unwrap();
    for page in 0..100 {
        expect(&read_later(&mapping, page * PAGE_SIZE), page * PAGE_SIZE);
    }
    let service = service(1, &[armed]);
    for page in 100..PAGES {
        check_page(&mapping, page);
    }
    // The last page is mapped, and so can be read, just before it counts as present.
    until("the last page is present", || pager.bitmap().is_complete());
    service.finish().unwrap();
    assert_eq!(pager.stats().path(FaultPath::Guest).faults, PAGES - 100);
}

/// Beyond the mapping may lie another region's, with missing pages.
#[test]
fn pages_outside_of_a_mapping_are_left_alone() {
    // The last word of its bitmap has unused bits, which read as present.
    let pager = pager(BackingKind::Shmem, 10 * PAGE_SIZE);
    let armed = ArmedMapping::own(&uffd(), mapping(&pager), &pager, FaultPath::Guest).unwrap();
    for pages in [PageRange::page(10), PageRange::new(9, 2), PageRange::new(u64::MAX, 2)] {
        let error = armed.map_present(pages).unwrap_err();
        assert!(error.to_string().contains("the mapping has 10"), "{pages:?}: {error}");
    }
}

/// A present page does not stay mapped for ever: the kernel may unmap it.
#[test]
fn unmapped_page_comes_back() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
    pager.set_guest_trap(armed.clone()).unwrap();
    let _service = service(1, &[armed]);
    check_page(&mapping, 3);
    // SAFETY: the range belongs to the mapping, nothing refers to it, and its object keeps the
    // bytes.
    unsafe { libc::madvise(mapping.at(0).as_ptr().cast(), 16384, libc::MADV_DONTNEED) };
    expect(&read_later(&mapping, 3 * PAGE_SIZE), 3 * PAGE_SIZE);
}

#[test]
fn another_process_gets_whole_chunks() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    // It makes no difference that the other process is this one.
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    assert_eq!((armed.granularity(), armed.path()), (CHUNK * PAGE_SIZE, FaultPath::BackEnd));
    let service = service(DEFAULT_THREADS, &[armed]);
    check_page(&mapping, 600);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(512, 512)), 0);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, 512)), 512);
    for page in (0..PAGES).rev() {
        check_page(&mapping, page);
    }
    service.finish().unwrap();
    let report = pager.stats().path(FaultPath::BackEnd);
    assert_eq!(report.granularity_histogram, [(2 << 20, 2), (1 << 20, 1)].into());
}

/// The case that MISSING alone gets wrong: a neighbour was written.
#[test]
fn a_half_filled_chunk_is_completed_first() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    let _service = service(DEFAULT_THREADS, &[armed]);
    for page in [1, 7, 511, 700] {
        pager.fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    // A page that is present, in a chunk that is not complete.
    expect(&read_later(&mapping, 7 * PAGE_SIZE), 7 * PAGE_SIZE);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, 512)), 0);
    for page in 0..PAGES {
        check_page(&mapping, page);
    }
}

#[test]
fn incomplete_chunk_is_not_reachable() {
    let (source, control) = far(SIZE);
    let pager = pager_on(common::backing(BackingKind::Shmem, SIZE), source);
    let (uffd, mapping) = (uffd(), mapping(&pager));
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    let service = service(DEFAULT_THREADS, &[armed]);
    let _guard = control.release_at_the_end();
    control.hold([511]);
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    until("the others arrive", || !pager.bitmap().is_missing(2) && !pager.bitmap().is_missing(99));
    let neighbour = read_later(&mapping, 99 * PAGE_SIZE);
    expect_blocked(&reader);
    expect_blocked(&neighbour);
    assert!(matches!(service.finish(), Err(ServiceError::Incomplete { .. })));
    control.release();
    expect(&reader, 2 * PAGE_SIZE);
    expect(&neighbour, 99 * PAGE_SIZE);
    expect(&read_later(&mapping, 511 * PAGE_SIZE), 511 * PAGE_SIZE);
    // A thread that touched the chunk while it was being fetched did not cause another fault.
    until("it is counted", || pager.stats().path(FaultPath::BackEnd).faults > 0);
    assert_eq!(pager.stats().path(FaultPath::BackEnd).faults, 1);
}

#[test]
fn slow_page_delays_no_other() {
    let (source, control) = far(SIZE);
    let pager = pager_on(common::backing(BackingKind::Shmem, SIZE), source);
    let (uffd, mapping) = (uffd(), mapping(&pager));
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
    pager.set_guest_trap(armed.clone()).unwrap();
    // A single thread, which must not be the one that waits.
    let service = service(1, &[armed]);
    let _guard = control.release_at_the_end();
    control.hold([1, 2, 3]);
    let slow = [1, 2, 3].map(|page| read_later(&mapping, page * PAGE_SIZE));
    thread::sleep(A_WHILE);
    for page in [5, 6, 7, 8] {
        expect(&read_later(&mapping, page * PAGE_SIZE), page * PAGE_SIZE);
    }
    slow.iter().for_each(expect_blocked);
    control.release();
    for (reader, page) in slow.iter().zip(1..) {
        expect(reader, page * PAGE_SIZE);
    }
    service.stop();
}

#[test]
fn a_failing_source_leaves_the_fault_open() {
    for foreign in [false, true] {
        let (source, control) = far(SIZE);
        let pager = pager_on(common::backing(BackingKind::Shmem, SIZE), source);
        let (uffd, mapping) = (uffd(), mapping(&pager));
        let armed = if foreign {
            ArmedMapping::foreign(&uffd, base(&mapping), &pager)
        } else {
            ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm)
        };
        let _service = service(DEFAULT_THREADS, &[armed.unwrap()]);
        control.fail([1]);
        let reader = read_later(&mapping, PAGE_SIZE);
        expect_blocked(&reader);
        until("it is tried again", || pager.stats().source().retries > 2);
        assert!(pager.bitmap().is_missing(1));
        control.recover();
        expect(&reader, PAGE_SIZE);
    }
}

/// Another process can hold its address space locked: a vCPU that publishes a page must not wait
/// for it.
#[test]
fn the_service_resolves_other_processes_faults() {
    let (source, control) = far(SIZE);
    let pager = pager_on(common::backing(BackingKind::Shmem, SIZE), source);
    let (theirs, mapping) = (uffd(), mapping(&pager));
    let foreign = ArmedMapping::foreign(&theirs, base(&mapping), &pager).unwrap();
    let service = service(1, &[foreign]);
    let _guard = control.release_at_the_end();
    control.hold([511]);
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    until("the others arrive", || !pager.bitmap().is_missing(2));

    // The only thread of the service is busy, here with the report of a failure.
    let (told, tell) = mpsc::channel();
    let (free, busy) = mpsc::channel::<()>();
    let (told, busy) = (Mutex::new(told), Mutex::new(busy));
    let retrier = Retrier::new(RetryPolicy::default(), move |_| {
        let _ = told.lock().unwrap().send(());
        // It ends with the sender.
        let _ = busy.lock().unwrap().recv();
    });
    let backing = common::backing(BackingKind::Shmem, SIZE);
    let other =
        Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing, Arc::new(Broken(SIZE))) })
            .unwrap();
    let (own, blocked) = (uffd(), common::mapping(&other));
    let armed = ArmedMapping::own(&own, blocked.clone(), &other, FaultPath::Vmm).unwrap();
    service.add(&[armed]).unwrap();
    let _reader = read_later(&blocked, 0);
    tell.recv_timeout(PATIENCE).expect("the service is busy");

    control.release();
    until("the last page is present", || !pager.bitmap().is_missing(511));
    expect_blocked(&reader);
    drop(free);
    expect(&reader, 2 * PAGE_SIZE);
    other.stop();
}

/// Many readers of one memory, through all kinds of mappings at once.
#[test]
fn all_mappings_read_the_image_at_once() {
    for round in 0..3 {
        let (source, _control) = far(SIZE);
        let pager = pager_on(common::backing(BackingKind::Shmem, SIZE), source);
        let (guest, access, back_end) = (mapping(&pager), mapping(&pager), mapping(&pager));
        let (own, theirs) = (uffd(), uffd());
        let armed = [
            ArmedMapping::own(&own, guest.clone(), &pager, FaultPath::Guest).unwrap(),
            ArmedMapping::own(&own, access.clone(), &pager, FaultPath::Vmm).unwrap(),
            ArmedMapping::foreign(&theirs, base(&back_end), &pager).unwrap(),
        ];
        pager.set_guest_trap(armed[0].clone()).unwrap();
        let service = service(DEFAULT_THREADS, &armed);
        let mut readers = Vec::new();
        for (index, mapping) in
            [&guest, &access, &back_end, &guest, &access, &back_end].into_iter().enumerate()
        {
            let mapping = mapping.clone();
            readers.push(thread::spawn(move || {
                let pages = random(round * 1000 + index as u64 + 1);
                pages.take(400).for_each(|page| check_page(&mapping, page % PAGES));
            }));
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        for mapping in [&guest, &access, &back_end] {
            (0..PAGES).for_each(|page| check_page(mapping, page));
        }
        until("the last page is present", || pager.bitmap().is_complete());
        service.finish().unwrap();
        assert!(own.is_closed() && theirs.is_closed());
        // No access is trapped any more.
        for mapping in [&guest, &access, &back_end] {
            (0..PAGES).for_each(|page| check_page(mapping, page));
        }
    }
}

#[test]
fn faults_in_no_mapping_are_left_alone() {
    let (pager, other, uffd) = (shmem(), shmem(), uffd());
    let (mapping, strange) = (common::mapping(&pager), common::mapping(&other));
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    uffd.register(base(&strange), SIZE, Modes::ALL).unwrap();
    let service = service(DEFAULT_THREADS, &[armed]);
    let readers = [0, 1, 2].map(|page| read_later(&strange, page * PAGE_SIZE));
    readers.iter().for_each(expect_blocked);
    expect(&read_later(&mapping, PAGE_SIZE), PAGE_SIZE);
    // The fault is served once its mapping is known, although its message was read long ago.
    let late = ArmedMapping::own(&uffd, strange.clone(), &other, FaultPath::Vmm).unwrap();
    service.add(&[late]).unwrap();
    for (reader, page) in readers.iter().zip(0..) {
        expect(reader, page * PAGE_SIZE);
    }
}

/// A thread still waits for a page that is already mapped: it is woken, and the rest of the chunk
/// is mapped.
#[test]
fn waiter_on_a_mapped_page_is_woken() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    pager.fetch(PageRange::new(0, CHUNK), FaultPath::Fill).unwrap();
    let readers = [3, 9].map(|page| read_later(&mapping, page * PAGE_SIZE));
    readers.iter().for_each(expect_blocked);
    for page in [3, 9] {
        let range = raw::uffdio_range { start: base(&mapping) + page * PAGE_SIZE, len: PAGE_SIZE };
        // Mode 1 wakes no thread.
        let mut argument = raw::uffdio_continue { range, mode: 1, mapped: 0 };
        let (fd, request) = (uffd.try_clone_fd().unwrap(), linux_raw_sys::ioctl::UFFDIO_CONTINUE);
        // SAFETY: the request reads and writes this structure.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), &mut argument) };
        assert_eq!(result, 0);
    }
    readers.iter().for_each(expect_blocked);
    let _service = service(1, &[armed]);
    for (reader, page) in readers.iter().zip([3, 9]) {
        expect(reader, page * PAGE_SIZE);
    }
    (0..CHUNK).for_each(|page| check_page(&mapping, page));
    until("the fault is counted", || pager.stats().path(FaultPath::BackEnd).faults == 1);
}

#[test]
fn trap_stays_until_no_page_is_missing() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = service(DEFAULT_THREADS, std::slice::from_ref(&armed));
    check_page(&mapping, 1);
    let error = service.release(&uffd).unwrap_err();
    assert!(matches!(error, ServiceError::Incomplete { missing } if missing == PAGES - 1));
    check_page(&mapping, 2);
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    service.release(&uffd).unwrap();
    assert!(!uffd.is_closed(), "a back-end is told before");
    (0..PAGES).for_each(|page| check_page(&mapping, page));
}

#[test]
fn nothing_is_left_after_the_end() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = service(3, std::slice::from_ref(&armed));
    assert!(format!("{service:?}").contains("threads: 3"));
    check_page(&mapping, 1);
    service.stop();
    assert!(format!("{service:?}").contains("threads: 0"));
    assert!(matches!(service.add(&[armed]), Err(ServiceError::Stopped)));
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    expect_blocked(&reader);
    // Another service takes over, for the waiting thread too.
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let second = FaultService::start(1).unwrap();
    second.add(&[armed]).unwrap();
    expect(&reader, 2 * PAGE_SIZE);
}

#[test]
fn a_stopped_memory_leaves_faults_open() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = service(1, &[armed]);
    pager.stop();
    let reader = read_later(&mapping, PAGE_SIZE);
    expect_blocked(&reader);
    service.stop();
    expect_blocked(&reader);
}

/// Without the pager no missing page can become present, but none reads as zeros either.
#[test]
fn dropped_incomplete_region_is_not_released() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = service(1, std::slice::from_ref(&armed));
    check_page(&mapping, 1);
    drop(pager);
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    expect_blocked(&reader);
    assert!(matches!(service.finish(), Err(ServiceError::Incomplete { .. })));
    assert!(matches!(service.release(&uffd), Err(ServiceError::Incomplete { .. })));
    expect_blocked(&reader);
}

#[test]
fn dropped_complete_region_is_released() {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = service(1, &[armed]);
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    drop(pager);
    service.finish().unwrap();
    (0..PAGES).for_each(|page| check_page(&mapping, page));
}

/// Pages still become present for readers of other mappings when the guest's mapping cannot show
/// them any more.
fn pages_arrive_without_the_guests_trap(end: impl FnOnce(&ArmedMapping, &Mapping)) {
    let (pager, uffd) = (shmem(), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
    pager.set_guest_trap(armed.clone()).unwrap();
    let _service = service(1, std::slice::from_ref(&armed));
    check_page(&mapping, 1);
    end(&armed, &mapping);
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    until("all pages arrive", || pager.bitmap().is_complete());
}

#[test]
fn pages_arrive_after_the_memslot_is_gone() {
    pages_arrive_without_the_guests_trap(|_, mapping| {
        mapping.revoke().unwrap();
        mapping.remove_guard();
    });
}

#[test]
fn pages_arrive_after_the_userfaultfd_is_closed() {
    pages_arrive_without_the_guests_trap(|armed, mapping| {
        mapping.revoke().unwrap();
        armed.uffd().close();
    });
}

/// A mapping is either refused, or part of what the end looks at.
#[test]
fn end_misses_no_mapping_that_is_added() {
    let (mut refused, mut incomplete) = (0, 0);
    for round in 0..200 {
        let service = FaultService::start(1).unwrap();
        let arm = |pager: &Arc<Pager>| service.arm_guest([pager], VcpuTrap::Mapping);
        // Mappings whose release takes the end some time.
        let complete: Vec<_> = (0..8)
            .map(|_| {
                let pager = pager(BackingKind::Shmem, PAGE_SIZE);
                let guest = arm(&pager).unwrap();
                pager.fetch(PageRange::page(0), FaultPath::Fill).unwrap();
                guest
            })
            .collect();
        let pager = pager(BackingKind::Shmem, 4 * PAGE_SIZE);
        let armed = thread::scope(|scope| {
            let armed = scope.spawn(|| arm(&pager));
            thread::sleep(Duration::from_micros(2 * round));
            let finished = service.finish();
            let armed = armed.join().unwrap();
            match &finished {
                Ok(()) => refused += 1,
                Err(ServiceError::Incomplete { missing: 4 }) => incomplete += 1,
                Err(error) => panic!("{error}"),
            }
            assert_ne!(finished.is_ok(), armed.is_ok(), "{finished:?}, {armed:?}");
            armed
        });
        if let Ok(guest) = armed {
            expect(&read_later(guest[0].mapping(), PAGE_SIZE), PAGE_SIZE);
        }
        drop(complete);
    }
    println!("{refused} mappings were refused, {incomplete} ends");
}
