// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Back-ends that cannot, will not, or must not be used.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Memory;
use common::foolish::{Folly, Foolish, PAGEFAULT, REPLY_ACK};
use demand_memory::BackingKind;
use demand_uffd::{FaultService, OpenError};
use demand_vhost::{BackEnd, Error, Options};
use test_support::wait::PATIENCE;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

const SET_MEM_TABLE: u32 = 5;
const END: u32 = 30;

fn service() -> Arc<FaultService> {
    Arc::new(FaultService::start(1).unwrap())
}

fn options() -> Options {
    Options { patience: Duration::from_millis(500), ..Options::default() }
}

/// What comes of sharing missing memory with such a back-end, and the requests that it got.
fn share(folly: Folly) -> (Error, Vec<u32>) {
    let foolish = Foolish::start(folly, REPLY_ACK | PAGEFAULT);
    let memory = Memory::new(BackingKind::Shmem);
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    println!("{text}");
    drop(back_end);
    (error, foolish.requests())
}

#[test]
fn nobody_listens() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let begun = Instant::now();
    let error = BackEnd::connect(&socket, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains("start the back-end first"), "{error}");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let error = BackEnd::connect(&socket, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_back_end_without_pagefault_sees_no_missing_memory() {
    let foolish = Foolish::start(Folly::None, REPLY_ACK);
    let memory = Memory::new(BackingKind::Shmem);
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    assert!(!back_end.has_pagefault());
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    assert!(matches!(error, Error::NoPagefault { .. }), "{error}");
    let error = back_end.share_present_memory(&memory.memory).unwrap_err();
    assert!(
        matches!(error, Error::Incomplete { missing, .. } if missing == 2 * common::PAGES),
        "{error}"
    );
    // Filled, it may have it.
    memory.fill();
    back_end.share_present_memory(&memory.memory).unwrap();
    back_end.end_postcopy().unwrap();
    let error = back_end.share_present_memory(&memory.memory).unwrap_err();
    assert!(matches!(error, Error::Order { .. }), "{error}");
    drop(back_end);
    let requests = foolish.requests();
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
    assert!(!requests.contains(&END));
}

#[test]
fn features_that_are_needed_and_lack_are_named() {
    let foolish = Foolish::start(Folly::None, PAGEFAULT);
    let error = BackEnd::connect(&foolish.socket, options()).unwrap_err();
    assert!(error.to_string().contains("REPLY_ACK"), "{error}");
    let foolish = Foolish::start(Folly::None, REPLY_ACK | PAGEFAULT);
    let needed = VhostUserProtocolFeatures::CONFIG;
    let error = BackEnd::connect(&foolish.socket, Options { needed, ..options() }).unwrap_err();
    assert!(matches!(error, Error::Features { lacking, .. } if lacking == needed), "{error}");
    let foolish = Foolish::start(Folly::NoProtocolFeatures, 0);
    let error = BackEnd::connect(&foolish.socket, options()).unwrap_err();
    assert!(matches!(error, Error::Features { .. }), "{error}");
}

#[test]
fn our_own_addresses_are_recognised() {
    let (error, requests) = share(Folly::Echoes);
    assert!(matches!(error, Error::EchoedAddress { .. }), "{error}");
    // Without our acknowledgement it never runs.
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
}

#[test]
fn addresses_that_cannot_be_right_are_refused() {
    for folly in [Folly::Unaligned, Folly::Overlaps, Folly::PastTheEnd] {
        let (error, requests) = share(folly);
        // The vhost crate refuses some by itself.
        assert!(
            matches!(error, Error::BadBase { .. } | Error::Protocol { .. }),
            "{folly:?} {error}"
        );
        assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
    }
    let (error, requests) = share(Folly::Unmapped);
    assert!(matches!(error, Error::Arm(_)), "{error}");
    // Its mappings are armed before it gets our acknowledgement.
    assert_eq!(requests.iter().filter(|request| **request == SET_MEM_TABLE).count(), 1);
}

#[test]
fn other_regions_than_ours_are_refused() {
    let (error, _) = share(Folly::OtherRegions);
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    // The vhost crate waits for the bytes that are not there.
    let (error, _) = share(Folly::TooFew);
    assert!(matches!(error, Error::Silent { .. } | Error::Protocol { .. }), "{error}");
}

#[test]
fn a_back_end_that_refuses_or_has_no_userfaultfd_is_told_apart() {
    let (error, _) = share(Folly::NoUserfaultfd);
    assert!(matches!(error, Error::NoUserfaultfd { .. }), "{error}");
    let (error, _) = share(Folly::AnotherFile);
    assert!(matches!(error, Error::Userfaultfd(OpenError::NoUserfaultfd(_))), "{error}");
    let (error, _) = share(Folly::Refuses);
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[test]
fn a_back_end_that_goes_away_or_says_nothing_holds_up_nobody() {
    let (error, _) = share(Folly::Closes);
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    let begun = Instant::now();
    let (error, _) = share(Folly::SaysNothing);
    assert!(matches!(error, Error::Silent { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_end_is_asked_for_with_an_answer() {
    for folly in [Folly::None, Folly::ClosesAtTheEnd] {
        let foolish = Foolish::start(folly, REPLY_ACK | PAGEFAULT);
        let memory = Memory::new(BackingKind::Shmem);
        let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
        back_end.share_missing_memory(&memory.memory, &service()).unwrap();
        assert!(matches!(back_end.end_postcopy(), Err(Error::Incomplete { .. })));
        memory.fill();
        let ended = back_end.end_postcopy();
        match folly {
            Folly::None => {
                ended.unwrap();
                // It keeps its userfaultfd, and yet nothing is trapped any more.
                let mappings = foolish.mappings.clone();
                let (sender, receiver) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    for mapping in mappings.lock().unwrap().iter() {
                        for offset in (0..mapping.len()).step_by(4096) {
                            // SAFETY: the byte lies in the mapping, and nobody writes it.
                            unsafe { mapping.at(offset).as_ptr().read_volatile() };
                        }
                    }
                    let _ = sender.send(());
                });
                receiver.recv_timeout(PATIENCE).expect("nothing is trapped");
            }
            _ => assert!(matches!(ended, Err(Error::Disconnected { .. })), "{ended:?}"),
        }
        // Once is enough.
        back_end.end_postcopy().unwrap();
        drop(back_end);
        assert_eq!(foolish.requests().iter().filter(|request| **request == END).count(), 1);
    }
}

#[test]
fn more_regions_than_a_message_names_are_refused() {
    let foolish = Foolish::start(Folly::None, REPLY_ACK | PAGEFAULT);
    let starts: Vec<u64> = (0..9).map(|index| index * common::SIZE).collect();
    let memory = Memory::with(BackingKind::Shmem, &starts);
    let mut back_end = BackEnd::connect(&foolish.socket, options()).unwrap();
    let error = back_end.share_missing_memory(&memory.memory, &service()).unwrap_err();
    assert!(matches!(error, Error::Regions(9)), "{error}");
}
