// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The wrapper's calls, on a real userfaultfd.

mod common;

use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::{NonNull, null};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{base, mapping, pager, read, read_later, uffd};
use demand_memory::{
    Backing, BackingKind, FaultPath, MappedBytes, Mapping, PAGE_SIZE, PageRange, to_usize,
};
use demand_uffd::{
    Access, Answer, Cause, Event, Features, Modes, OpenError, RangeError, Userfaultfd, probe,
};
use test_support::host::{has_kvm, skip};
use test_support::wait::{PATIENCE, until};

const PAGES: u64 = 8;
const PAGE_BYTES: usize = to_usize(PAGE_SIZE);

/// Creates an untrapped mapping of shared memory in whose object the given pages exist; returns it
/// with its address.
fn shmem(present: &[u64]) -> (Arc<Mapping>, u64) {
    let backing = common::backing(BackingKind::Shmem, PAGES * PAGE_SIZE);
    let populate = backing.map().unwrap();
    for page in present {
        // SAFETY: the word lies in the mapping, and no reference to it exists.
        unsafe { populate.at(page * PAGE_SIZE).cast::<u64>().as_ptr().write_volatile(page + 100) };
    }
    let mapping = Arc::new(backing.map().unwrap());
    let base = base(&mapping);
    (mapping, base)
}

/// Creates missing pages with the given content. No test holds a reference to a mapping's bytes.
fn create(uffd: &Userfaultfd, address: u64, content: &[u8]) -> Result<(), RangeError> {
    // SAFETY: a slice is mapped and does not change while it is borrowed, and no reference to the
    // pages exists.
    unsafe { uffd.copy(address, MappedBytes::new(NonNull::from(content).cast(), content.len())) }
}

#[test]
fn kernel_has_needed_and_lacks_unknown_features() {
    let wanted = Features::MISSING_SHMEM | Features::from_bits(1 << 60);
    match Userfaultfd::open(wanted) {
        Err(OpenError::Features { lacking, .. }) => assert_eq!(lacking.bits(), 1 << 60),
        other => panic!("{other:?}"),
    }
    let probe = probe().unwrap();
    assert!(probe.features.contains(Features::GUEST_MEMORY), "{}", probe.features);
    for kind in BackingKind::ALL {
        assert_eq!(probe.can_page(kind), kind.traps_in_mappings(), "{kind}: {probe:?}");
    }
    assert_eq!(probe.exact_address, Answer::Yes);
    // The device is tried first.
    let device = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd");
    assert_eq!(probe.access == Access::Device, device.is_ok());
}

#[test]
fn existing_pages_are_mapped_and_others_distinguished() {
    let (mapping, base) = shmem(&[0, 1, 2, 3, 6]);
    let uffd = uffd();
    let pages = |pages: u64| pages * PAGE_SIZE;
    let error = uffd.r#continue(base, PAGE_SIZE).unwrap_err();
    assert_eq!(error.cause(), Cause::NotRegistered, "{error}");
    uffd.register(base, pages(PAGES), Modes::ALL).unwrap();

    uffd.r#continue(base + pages(2), PAGE_SIZE).unwrap();
    assert_eq!(read(&mapping, pages(2)), 102);
    let error = uffd.r#continue(base, pages(4)).unwrap_err();
    assert_eq!((error.cause(), error.done), (Cause::Exists, pages(2)), "{error}");
    let error = uffd.r#continue(base + pages(3), pages(5)).unwrap_err();
    assert_eq!((error.cause(), error.done), (Cause::NoPage, PAGE_SIZE), "{error}");
    assert_eq!([0, 1, 3].map(|page| read(&mapping, pages(page))), [100, 101, 103]);

    create(&uffd, base + pages(4), &[0; PAGE_BYTES]).unwrap();
    assert_eq!(read(&mapping, pages(4)), 0);
    let error = create(&uffd, base + pages(5), &[7; 2 * PAGE_BYTES]).unwrap_err();
    assert_eq!((error.cause(), error.done), (Cause::Exists, PAGE_SIZE), "{error}");
    assert_eq!(read(&mapping, pages(5)), u64::from_ne_bytes([7; 8]));

    let error = uffd.r#continue(base + 1, PAGE_SIZE).unwrap_err();
    assert_eq!(error.cause(), Cause::Other, "{error}");
    uffd.wake(base, pages(PAGES)).unwrap();
    uffd.unregister(base, pages(PAGES)).unwrap();
    assert_eq!([6, 7].map(|page| read(&mapping, pages(page))), [106, 0]);
}

#[test]
fn a_closed_one_says_so() {
    let (_mapping, base) = shmem(&[]);
    let uffd = uffd();
    assert!(!uffd.is_closed());
    uffd.close();
    assert!(uffd.is_closed());
    assert_eq!(uffd.wake(base, PAGE_SIZE).unwrap_err().cause(), Cause::Closed);
    assert_eq!(uffd.r#continue(base, PAGE_SIZE).unwrap_err().cause(), Cause::Closed);
    assert!(uffd.read(&mut Vec::new()).is_err());
}

#[test]
fn faults_are_reported_with_kind_and_address() {
    let (mapping, base) = shmem(&[1]);
    let uffd = Userfaultfd::open(Features::GUEST_MEMORY | Features::EXACT_ADDRESS).unwrap();
    uffd.register(base, PAGES * PAGE_SIZE, Modes::ALL).unwrap();
    for (page, is_minor) in [(1, true), (2, false)] {
        let reader = read_later(&mapping, page * PAGE_SIZE + 0x128);
        let mut events = Vec::new();
        until("a fault is told", || uffd.read(&mut events).unwrap() > 0);
        let [Event::Pagefault { address, write: false, minor, write_protected: false }] =
            events[..]
        else {
            panic!("{events:?}");
        };
        assert_eq!((address, minor), (base + page * PAGE_SIZE + 0x128, is_minor));
        let page_address = base + page * PAGE_SIZE;
        if minor {
            uffd.r#continue(page_address, PAGE_SIZE).unwrap();
        } else {
            create(&uffd, page_address, &[0; PAGE_BYTES]).unwrap();
        }
        assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 0);
    }
}

#[test]
fn nothing_can_be_mapped_while_an_event_waits() {
    let (mapping, base) = shmem(&[0, 1]);
    let features = Features::GUEST_MEMORY | Features::EVENT_REMOVE;
    let uffd = Userfaultfd::open(features).unwrap();
    uffd.register(base, PAGES * PAGE_SIZE, Modes::ALL).unwrap();
    let remover = {
        let mapping = mapping.clone();
        thread::spawn(move || {
            let address = mapping.at(4 * PAGE_SIZE).as_ptr();
            // SAFETY: no reference to these pages of the mapping exists.
            unsafe { libc::madvise(address.cast(), PAGE_BYTES, libc::MADV_DONTNEED) }
        })
    };
    // Page 0 exists but is not mapped, so without the event the answer would be EEXIST at the
    // latest.
    until("the event holds the request up", || {
        uffd.r#continue(base, PAGE_SIZE).is_err_and(|error| error.cause() == Cause::Again)
    });
    let mut events = Vec::new();
    until("the event is told", || uffd.read(&mut events).unwrap() > 0);
    let removed = base + 4 * PAGE_SIZE;
    assert!(
        matches!(events[..], [Event::Remove { start, end }]
            if start == removed && end == removed + PAGE_SIZE),
        "{events:?}"
    );
    assert_eq!(remover.join().unwrap(), 0);
    until("the request is done", || match uffd.r#continue(base, PAGE_SIZE) {
        Ok(()) => true,
        Err(error) => error.cause() == Cause::Exists,
    });
}

#[test]
fn only_an_initialised_userfaultfd_is_accepted() {
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let error = Userfaultfd::from_received(file).unwrap_err();
    assert!(error.to_string().contains("not a userfaultfd"), "{error}");

    // SAFETY: the call takes flags and creates a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    let fd = fd.try_into().expect("a descriptor");
    // SAFETY: the kernel has just created this descriptor, and no other code owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let error = Userfaultfd::from_received(fd).unwrap_err();
    assert!(error.to_string().contains("never initialised"), "{error}");

    let uffd = Userfaultfd::from_received(uffd().try_clone_fd().unwrap()).unwrap();
    assert_eq!(uffd.read(&mut Vec::new()).unwrap(), 0);
}

/// KVM's device answers an unknown request as a userfaultfd answers a request with an empty range.
#[test]
fn a_device_is_refused_without_proc_too() {
    if !has_kvm() {
        return skip("/dev/kvm is needed");
    }
    let refused = thread::spawn(|| {
        // SAFETY: the calls take constants, and change only the namespace of this thread.
        let alone = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(
                    null(),
                    c"/".as_ptr(),
                    null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    null(),
                ) == 0
                // Mounted over it, because /proc may contain other mounts.
                && libc::mount(c"none".as_ptr(), c"/proc".as_ptr(), c"tmpfs".as_ptr(), 0, null())
                    == 0
        };
        assert!(alone, "{}", std::io::Error::last_os_error());
        assert!(!std::path::Path::new("/proc/self/fd").exists());
        Userfaultfd::from_received(uffd().try_clone_fd().unwrap()).unwrap();
        let device = std::fs::File::open("/dev/kvm").unwrap();
        Userfaultfd::from_received(OwnedFd::from(device)).map(drop).unwrap_err()
    });
    let error = refused.join().unwrap();
    assert!(error.to_string().contains("not a userfaultfd"), "{error}");
}

/// Shows why no range is registered for MINOR alone: the kernel lets accesses to a hole through, as
/// zeros.
#[test]
fn minor_alone_lets_holes_through() {
    let (mapping, base) = shmem(&[1]);
    let uffd = uffd();
    uffd.register(base, PAGES * PAGE_SIZE, Modes::MINOR).unwrap();
    assert_eq!(read(&mapping, 0), 0);
    assert!(uffd.read(&mut Vec::new()).unwrap() == 0, "no event");
    let reader = read_later(&mapping, PAGE_SIZE);
    common::expect_blocked(&reader);
    uffd.r#continue(base + PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 101);
}

/// Armed mappings trap accesses both to pages that were never written and to pages that are only
/// unmapped.
#[test]
fn armed_mappings_trap_both() {
    for foreign in [false, true] {
        let pager = pager(BackingKind::Shmem, PAGES * PAGE_SIZE);
        pager.fetch(PageRange::page(1), FaultPath::Fill).unwrap();
        let (uffd, mapping) = (uffd(), mapping(&pager));
        let armed = if foreign {
            demand_uffd::ArmedMapping::foreign(&uffd, base(&mapping), &pager)
        } else {
            demand_uffd::ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm)
        };
        let armed = armed.unwrap();
        assert_eq!(armed.modes(), Modes::ALL);
        for (page, is_minor) in [(1, true), (2, false)] {
            let reader = read_later(&mapping, page * PAGE_SIZE);
            let mut events = Vec::new();
            until("the touch is told", || uffd.read(&mut events).unwrap() > 0);
            assert!(
                matches!(events[..], [Event::Pagefault { minor, .. }] if minor == is_minor),
                "{events:?}"
            );
            common::expect_blocked(&reader);
            uffd.unregister(base(&mapping) + page * PAGE_SIZE, PAGE_SIZE).unwrap();
            reader.recv_timeout(PATIENCE).unwrap();
        }
    }
}

/// The kernel wakes the waiters of a range and then removes the trap. A thread that faults between
/// the two steps must not wait for ever. Before the fix one did, within some thousand rounds.
#[test]
fn unregister_wakes_late_faulter() {
    let (mapping, base) = shmem(&(0..PAGES).collect::<Vec<_>>());
    let len = PAGES * PAGE_SIZE;
    let uffd = uffd();
    let (done, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = {
        let (mapping, done, reads) = (mapping.clone(), done.clone(), reads.clone());
        thread::spawn(move || {
            for page in (0..PAGES).cycle() {
                assert_eq!(read(&mapping, page * PAGE_SIZE), page + 100);
                reads.fetch_add(1, Ordering::Relaxed);
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        })
    };
    // On one CPU the two overlap only if one is interrupted.
    let least = if thread::available_parallelism().unwrap().get() == 1 { 0 } else { 100 };
    let begun = Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < Duration::from_secs(3) || (rounds < least && begun.elapsed() < PATIENCE)
    {
        uffd.register(base, len, Modes::ALL).unwrap();
        let start = mapping.address().as_ptr().cast();
        // SAFETY: the pages stay in the memory object, so every read sees the same bytes.
        let dropped = unsafe { libc::madvise(start, to_usize(len), libc::MADV_DONTNEED) };
        assert_eq!(dropped, 0);
        // From no delay to longer than a fault takes.
        for _ in 0..rounds % 64 * 8 {
            std::hint::spin_loop();
        }
        uffd.unregister(base, len).unwrap();
        let before = reads.load(Ordering::Relaxed);
        let unregistered = Instant::now();
        while reads.load(Ordering::Relaxed) == before {
            assert!(unregistered.elapsed() < PATIENCE, "a fault of round {rounds} still waits");
            thread::yield_now();
        }
        rounds += 1;
    }
    done.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    assert!(rounds >= least, "only {rounds} rounds");
}
