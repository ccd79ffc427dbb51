// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests with back-ends that lack features, misbehave, or attack the front-end.

mod common;

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use common::Memory;
use common::foolish::Foolish;
use common::foolish::deed::{Base, Deed, Mischief, Sent, Step, Wrong};
use common::foolish::hostile::{END, GET_FEATURES, PAGEFAULT, REPLY_ACK, SET_MEM_TABLE};
use demand_memory::{BackingKind, FaultPath, PageRange, to_usize};
use demand_uffd::{FaultService, OpenError};
use demand_vhost::{BackEnd, Error, ErrorKind, HangUp, Options, Vring};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use test_support::host::huge_pages;
use test_support::wait::{PATIENCE, until};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

fn service() -> Arc<FaultService> {
    Arc::new(FaultService::start(1).unwrap())
}

const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

const TIME_LIMIT: Duration = Duration::from_millis(500);

/// Returns options for a back-end that answers, which takes longer on a busy machine.
fn options() -> Options {
    Options::default().patience(PATIENCE)
}

/// Returns options for a back-end that falls silent.
fn impatient() -> Options {
    Options::default().patience(TIME_LIMIT)
}

fn is_disconnected(result: &Result<(), Error>) -> bool {
    result.as_ref().is_err_and(|error| matches!(error.kind(), ErrorKind::Disconnected))
}

/// Shares missing memory with a back-end that does `deed`; returns the error and the requests that
/// the back-end received.
fn share(deed: Deed) -> (Error, Vec<u32>) {
    let foolish = Foolish::start(deed, REPLY_ACK | PAGEFAULT);
    let memory = Memory::new(BackingKind::Shmem);
    let is_silent = matches!(deed, Deed::At(Wrong::Silent, _) | Deed::Base(Base::TooFew));
    let options = if is_silent { impatient() } else { options() };
    let mut back_end = BackEnd::connect(&foolish.socket, options).unwrap();
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    assert!(text.contains(foolish.socket.to_str().unwrap()), "it names the back-end: {text}");
    drop(back_end);
    (error, foolish.requests())
}

#[test]
fn connecting_without_listener_fails_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let begun = Instant::now();
    let error = BackEnd::connect(&socket, Options::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Connect(_)), "{error}");
    assert!(error.to_string().contains("start the back-end first"), "{error}");
    drop(UnixListener::bind(&socket).unwrap());
    let error = BackEnd::connect(&socket, Options::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Connect(_)), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// Returns a listener whose queue is full, with the connection that fills it.
fn busy(socket: &Path) -> (OwnedFd, UnixStream) {
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let listener = listener.unwrap();
    bind(&listener, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(socket).unwrap())
}

#[test]
fn hang_up_ends_every_wait_while_connecting() {
    let directory = tempfile::tempdir().unwrap();
    let [full, silent] = ["full", "silent"].map(|name| directory.path().join(name));
    let _busy = busy(&full);
    let _silent = UnixListener::bind(&silent).unwrap();
    for socket in [full, silent] {
        let (sender, receiver) = channel();
        let attempt = thread::spawn(move || {
            let begun = |hang_up: &HangUp| sender.send(hang_up.clone()).unwrap();
            BackEnd::connect_with(&socket, Options::default(), begun).unwrap_err()
        });
        let hang_up = receiver.recv().unwrap();
        thread::sleep(Duration::from_millis(100));
        assert!(!attempt.is_finished(), "it waits");
        let begun = Instant::now();
        hang_up.hang_up();
        let error = attempt.join().unwrap();
        assert!(matches!(error.kind(), ErrorKind::Disconnected), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
}

#[test]
fn full_socket_queue_has_a_time_limit() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let (listener, first) = busy(&socket);
    let error = BackEnd::connect(&socket, options()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Silent { .. }), "{error}");
    // Until there is room.
    let attempt = thread::spawn(move || BackEnd::connect(&socket, options()).unwrap_err());
    thread::sleep(Duration::from_millis(50));
    drop(rustix::net::accept(&listener).unwrap());
    let second = rustix::net::accept(&listener).unwrap();
    drop((first, second));
    let error = attempt.join().unwrap();
    assert!(matches!(error.kind(), ErrorKind::Disconnected), "{error}");
}

#[test]
fn back_end_without_pagefault_sees_complete_memory_only() {
    let foolish = Foolish::start(Deed::Behave, REPLY_ACK);
    let memory = Memory::new(BackingKind::Shmem);
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    let error = back_end.expect_pagefault().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoPagefault), "{error}");
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoPagefault), "{error}");
    let error = back_end.share_present_memory(&memory.memory).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Incomplete { missing } if *missing == 2 * common::PAGES),
        "{error}"
    );
    // Complete memory may be shared.
    memory.fill();
    back_end.share_present_memory(&memory.memory).unwrap();
    back_end.end_postcopy().unwrap();
    let error = back_end.share_present_memory(&memory.memory).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Order { .. }), "{error}");
    drop(back_end);
    let requests = foolish.requests();
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
    assert!(!requests.contains(&END));
}

#[test]
fn missing_needed_features_are_named() {
    let foolish = Foolish::start(Deed::Behave, REPLY_ACK | PAGEFAULT);
    let needed = VhostUserProtocolFeatures::CONFIG;
    let error = BackEnd::connect(&foolish.socket, options().needed(needed)).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingFeatures(lacking) if *lacking == needed),
        "{error}"
    );
    let foolish = Foolish::start(Deed::NoProtocolFeatures, 0);
    let error = BackEnd::connect(&foolish.socket, options()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoProtocolFeatures), "{error}");
}

/// Without REPLY_ACK, the front-end takes the answer to the next request as the acknowledgement.
#[test]
fn back_end_without_reply_ack_sees_complete_memory() {
    for deed in [Deed::Behave, Deed::At(Wrong::HangUp, Step::VringAddr)] {
        let foolish = Foolish::start(deed, PAGEFAULT);
        let memory = Memory::new(BackingKind::Shmem);
        let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
        let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
        assert!(error.to_string().contains("REPLY_ACK"), "{error}");
        memory.fill();
        back_end.set_features(back_end.features()).unwrap();
        back_end.share_present_memory(&memory.memory).unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let vring = Vring {
            size: 16,
            descriptors: GuestAddress(0),
            available: GuestAddress(0x400),
            used: GuestAddress(0x800),
            next_available: 0,
            kick: &kick,
            call: &call,
        };
        let set = back_end.set_vring(0, &vring, true);
        drop(back_end);
        let requests = foolish.requests();
        let place = requests.iter().position(|request| *request == 9).unwrap();
        if deed == Deed::Behave {
            set.unwrap();
            assert_eq!(requests[place + 1], GET_FEATURES, "{requests:?}");
        } else {
            assert!(is_disconnected(&set), "{set:?}");
            assert_eq!(place + 1, requests.len(), "{requests:?}");
        }
    }
}

#[test]
fn our_own_addresses_are_recognised() {
    let (error, requests) = share(Deed::Base(Base::Echo));
    assert!(matches!(error.kind(), ErrorKind::EchoedAddress { .. }), "{error}");
    // Without our acknowledgement the back-end never runs.
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
}

#[test]
fn impossible_base_addresses_are_refused() {
    for deed in
        [Deed::Base(Base::Unaligned), Deed::Base(Base::Overlap), Deed::Base(Base::PastTheEnd)]
    {
        let (error, requests) = share(deed);
        // The vhost crate itself refuses some of these.
        assert!(
            matches!(error.kind(), ErrorKind::BadBase { .. } | ErrorKind::Protocol(_)),
            "{deed} {error}"
        );
        assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
    }
    let (error, requests) = share(Deed::Base(Base::Unmapped));
    assert!(matches!(error.kind(), ErrorKind::Arm(_)), "{error}");
    // The back-end's mappings are armed before our acknowledgement is sent.
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
}

#[test]
fn other_regions_than_ours_are_refused() {
    let (error, _) = share(Deed::Base(Base::OtherRegions));
    assert!(matches!(error.kind(), ErrorKind::Protocol(_)), "{error}");
    // The vhost crate waits for the bytes that never arrive.
    let (error, _) = share(Deed::Base(Base::TooFew));
    assert!(matches!(error.kind(), ErrorKind::Silent { .. } | ErrorKind::Protocol(_)), "{error}");
}

#[test]
fn refusal_and_missing_userfaultfd_are_distinguished() {
    let (error, _) = share(Deed::Uffd(Sent::None));
    assert!(matches!(error.kind(), ErrorKind::NoUserfaultfd(_)), "{error}");
    let (error, _) = share(Deed::Uffd(Sent::File));
    assert!(
        matches!(error.kind(), ErrorKind::Userfaultfd(OpenError::NoUserfaultfd { .. })),
        "{error}"
    );
    let (error, _) = share(Deed::At(Wrong::Refuse, Step::Listen));
    assert!(matches!(error.kind(), ErrorKind::Protocol(_)), "{error}");
}

#[test]
fn vanished_or_silent_back_end_blocks_no_caller() {
    let (error, _) = share(Deed::At(Wrong::HangUp, Step::MemTable));
    assert!(matches!(error.kind(), ErrorKind::Disconnected), "{error}");
    let begun = Instant::now();
    let (error, _) = share(Deed::At(Wrong::Silent, Step::MemTable));
    assert!(matches!(error.kind(), ErrorKind::Silent { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_end_is_asked_for_with_an_answer() {
    for deed in [Deed::Behave, Deed::At(Wrong::HangUp, Step::End)] {
        let foolish = Foolish::start(deed, REPLY_ACK | PAGEFAULT);
        let memory = Memory::new(BackingKind::Shmem);
        let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
        back_end.share_missing_memory(&memory.memory, &service()).unwrap();
        let early = back_end.end_postcopy().unwrap_err();
        assert!(matches!(early.kind(), ErrorKind::Incomplete { .. }), "{early}");
        memory.fill();
        let ended = back_end.end_postcopy();
        match deed {
            Deed::Behave => {
                ended.unwrap();
                // The back-end keeps its userfaultfd, but nothing is trapped any more.
                let mappings = foolish.mappings();
                let (sender, receiver) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    for mapping in mappings {
                        for offset in (0..mapping.len()).step_by(4096) {
                            mapping.read(offset);
                        }
                        assert!(mapping.is_intact());
                    }
                    let _ = sender.send(());
                });
                receiver.recv_timeout(PATIENCE).expect("nothing is trapped");
            }
            _ => assert!(is_disconnected(&ended), "{ended:?}"),
        }
        // A second call does nothing.
        back_end.end_postcopy().unwrap();
        drop(back_end);
        assert_eq!(foolish.requests().iter().filter(|request| **request == END).count(), 1);
    }
}

#[test]
fn more_regions_than_a_message_names_are_refused() {
    let foolish = Foolish::start(Deed::Behave, REPLY_ACK | PAGEFAULT);
    let starts: Vec<u64> = (0..9).map(|index| index * common::SIZE).collect();
    let memory = Memory::with(BackingKind::Shmem, &starts);
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TooManyRegions { regions: 9, .. }), "{error}");
}

/// A silent back-end is detected in time at each step, even at steps where it may have to wait for
/// pages.
#[test]
fn silence_at_any_step_ends() {
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    for step in [
        Step::SetFeatures,
        Step::Advise,
        Step::Begin,
        Step::VringNum,
        Step::VringAddr,
        Step::VringKick,
        Step::VringEnable,
        Step::GetVringBase,
    ] {
        let foolish = Foolish::start(Deed::At(Wrong::Silent, step), REPLY_ACK | PAGEFAULT);
        let memory = Memory::new(BackingKind::Shmem);
        let begun = Instant::now();
        let mut back_end = BackEnd::connect(&foolish.socket, impatient()).unwrap();
        let vring = Vring {
            size: 16,
            descriptors: GuestAddress(0),
            available: GuestAddress(0x400),
            used: GuestAddress(0x800),
            next_available: 0,
            kick: &kick,
            call: &call,
        };
        let error = back_end
            .set_features(back_end.features())
            .and_then(|()| back_end.share_missing_memory(&memory.memory, &service()))
            .and_then(|()| back_end.set_vring(0, &vring, true))
            .and_then(|()| back_end.stop_vring(0))
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Silent { .. }), "{}: {error}", step.name());
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", step.name());
    }
}

/// Shares memory with a back-end that touches it before its accesses are trapped, while some pages
/// are present and one page is being fetched.
fn prefaulted(what: Mischief, kind: BackingKind) {
    let foolish = Foolish::start(Deed::Memory(what), REPLY_ACK | PAGEFAULT);
    let memory = Memory::new(kind);
    let pagers = memory.pagers();
    for page in [1, 7] {
        pagers[0].fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    until("they arrive", || !pagers[0].bitmap().is_missing(7));
    const HELD: u64 = 701;
    memory.control.hold([HELD]);
    pagers[0].fetch(PageRange::page(HELD), FaultPath::Guest).unwrap();
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    let guest_memory = memory.memory.clone();
    let sharing = std::thread::spawn(move || {
        back_end.share_missing_memory(&guest_memory, &service()).map(|()| back_end)
    });
    std::thread::sleep(TIME_LIMIT / 2);
    let waits = !sharing.is_finished();
    memory.control.release();
    let _back_end = sharing.join().unwrap().unwrap();
    let mappings = foolish.mappings();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let wrong = |page: &u64| {
            let (mapping, at) = (&mappings[to_usize(page / common::PAGES)], page % common::PAGES);
            let word = mapping.read_word(to_usize(at * 4096) + 8);
            word != common::word_of(common::address_of(*page) + 8)
        };
        let _ = sender.send((0..2 * common::PAGES).filter(wrong).count());
    });
    let wrong = receiver.recv_timeout(PATIENCE).expect("it can read all of it");
    assert_eq!(wrong, 0, "{what:?}: pages that it reads as something else");
    assert!(waits, "{what:?}: a page that it has mapped had not arrived");
}

const EARLY: [Mischief; 3] = [Mischief::TouchEarly, Mischief::PopulateEarly, Mischief::LockEarly];

#[test]
fn prefaulted_memory_is_not_read_as_zeros() {
    EARLY.into_iter().for_each(|what| prefaulted(what, BackingKind::Shmem));
}

#[test]
fn prefaulted_huge_pages_are_not_read_as_zeros() {
    let Some(_pool) = huge_pages(6) else { return };
    EARLY.into_iter().for_each(|what| prefaulted(what, BackingKind::Hugetlb2M));
}

/// The front-end waits for prefaulted pages for as long as the source takes, but not beyond the end
/// of the connection.
#[test]
fn hanging_up_ends_the_wait_for_prefaulted_pages() {
    let foolish = Foolish::start(Deed::Memory(Mischief::PopulateEarly), REPLY_ACK | PAGEFAULT);
    let memory = Memory::new(BackingKind::Shmem);
    memory.control.hold([701]);
    memory.pagers()[0].fetch(PageRange::page(701), FaultPath::Guest).unwrap();
    let mut back_end = BackEnd::connect(&foolish.socket, impatient()).unwrap();
    let hang_up = back_end.hang_up();
    let (sender, shared) = std::sync::mpsc::channel();
    let guest_memory = memory.memory.clone();
    std::thread::spawn(move || {
        let _ = sender.send(back_end.share_missing_memory(&guest_memory, &service()));
    });
    assert!(shared.recv_timeout(TIME_LIMIT).is_err(), "the page has not arrived");
    hang_up.hang_up();
    let error = shared.recv_timeout(PATIENCE).expect("the wait ends").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Disconnected), "{error}");
    memory.control.release();
}

/// The time limit does not run while the back-end waits for a page.
#[test]
fn waiting_for_a_page_is_not_silence() {
    let foolish = Foolish::start(Deed::Memory(Mischief::Read), REPLY_ACK | PAGEFAULT);
    let memory = Memory::new(BackingKind::Shmem);
    memory.control.hold([511]);
    let control = memory.control.clone();
    let (begun, away) = (Instant::now(), 4 * TIME_LIMIT);
    let source = std::thread::spawn(move || {
        std::thread::sleep(away);
        control.release();
    });
    let mut back_end = BackEnd::connect(&foolish.socket, impatient()).unwrap();
    back_end.share_missing_memory(&memory.memory, &service()).unwrap();
    assert!(begun.elapsed() >= away, "{:?}", begun.elapsed());
    source.join().unwrap();
}

/// Shares all memory but its last region with a back-end that does `deed`, and inserts the last.
/// Returns the error, whether the connection is open then, and the requests for it.
fn insert(deed: Deed) -> (Result<(), Error>, bool, Vec<u32>) {
    let foolish = Foolish::start(deed, REPLY_ACK | PAGEFAULT | CONFIGURE_MEM_SLOTS);
    let memory = Memory::new(BackingKind::Shmem);
    let (low, high) =
        memory.memory.remove_region(GuestAddress(common::HIGH), common::SIZE).unwrap();
    let service = service();
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    back_end.share_missing_memory(&low, &service).unwrap();
    let inserted = back_end.insert_region(&*high);
    if let Err(error) = &inserted {
        let text = error.to_string();
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    }
    let open = back_end.check().is_ok();
    drop(back_end);
    let mut requests = foolish.requests();
    requests.retain(|request| [ADD_MEM_REG, REM_MEM_REG].contains(request));
    (inserted, open, requests)
}

/// A wrong base of a further region costs the region, and not the back-end.
#[test]
fn wrong_base_of_further_region_is_refused() {
    for base in
        [Base::Echo, Base::Unaligned, Base::Overlap, Base::PastTheEnd, Base::Unmapped, Base::Zero]
    {
        let (inserted, open, requests) = insert(Deed::Added(base));
        let error = inserted.unwrap_err();
        let expected = matches!(
            (base, error.kind()),
            (Base::Echo, ErrorKind::EchoedAddress { .. })
                | (Base::Unmapped, ErrorKind::Arm(_))
                | (_, ErrorKind::BadBase { .. })
        );
        assert!(expected && open, "{base:?}: {error}");
        // Taken back, and not acknowledged.
        assert_eq!(requests, [ADD_MEM_REG, REM_MEM_REG], "{base:?}");
    }
}

#[test]
fn no_base_of_further_region_ends_the_connection() {
    for wrong in [Wrong::HangUp, Wrong::Silent, Wrong::Refuse] {
        let (inserted, open, _) = insert(Deed::At(wrong, Step::AddRegion));
        assert!(inserted.is_err() && !open, "{wrong:?}: {inserted:?}");
    }
}

#[test]
fn more_regions_than_slots_are_refused() {
    let foolish = Foolish::start(Deed::Behave, REPLY_ACK | PAGEFAULT | CONFIGURE_MEM_SLOTS);
    let starts: Vec<u64> = (0..4).map(|index| index * common::SIZE).collect();
    let memory = Memory::with(BackingKind::Shmem, &starts);
    let (three, fourth) =
        memory.memory.remove_region(GuestAddress(starts[3]), common::SIZE).unwrap();
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    back_end.share_missing_memory(&three, &service()).unwrap();
    let error = back_end.insert_region(&*fourth).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoSlotLeft { most: 3 }), "{error}");
    back_end.remove_region(GuestAddress(starts[0])).unwrap();
    back_end.insert_region(&*fourth).unwrap();
}
