// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user back-end, in another process, of a VM whose regions come and go.
#![cfg(feature = "vhost")]

mod common;
#[allow(dead_code, reason = "it serves the tests of two crates, and this one uses a part")]
#[path = "../../demand-vhost/tests/common/process.rs"]
mod process;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use common::*;
use demand_paging::demand_memory::PAGE_SIZE;
use demand_paging::demand_vhost::{
    BackEnd, ErrorKind, Options, VhostUserProtocolFeatures as Features,
};
use demand_paging::{EngineChoice, Error, FillRate, Lazy, LazyBuilder, LazyRegion, LazyVm};
use process::{NOTHING, Process};
use test_support::image::{self, far};
use test_support::wait::PATIENCE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Guest address of the region that comes and goes, and its size in bytes.
const PLUGGED: u64 = 1 << 32;
const LEN: u64 = 4 << 20;
const START: GuestAddress = GuestAddress(PLUGGED);

/// Not a test: the entry point of the back-end's process.
#[test]
fn back_end() {
    process::run_if_asked();
}

/// Returns the word at a guest address (a multiple of 8).
fn word_of(address: u64) -> u64 {
    image::word_of(if address >= PLUGGED { address - PLUGGED } else { address })
}

fn region() -> LazyRegion {
    LazyRegion::new(9, START, LEN, Arc::new(far(LEN).0))
}

fn builder(engine: demand_paging::Engine) -> LazyBuilder {
    let builder = LazyBuilder::new(Arc::new(far(SIZE).0)).engine(EngineChoice::Only(engine));
    builder.lazy(Lazy::Require)
}

fn share(vm: &LazyVm, process: &Process, options: Options) -> Arc<Mutex<BackEnd>> {
    let mut back_end = BackEnd::connect(&process.socket, options).unwrap();
    back_end.set_features(back_end.features()).unwrap();
    let back_end = Arc::new(Mutex::new(back_end));
    vm.share_with(&back_end).unwrap();
    back_end
}

fn expect_nothing(process: &Process) {
    assert_eq!(process.read(PLUGGED + 8).recv_timeout(PATIENCE), Ok(NOTHING));
}

#[test]
fn back_ends_follow_regions() {
    if image().is_none() {
        return;
    }
    for engine in engines() {
        let (sender, finished) = channel();
        let builder = builder(engine).on_finish(move |outcome| drop(sender.send(outcome)));
        let vm = attach(builder.build().unwrap()).unwrap();
        let process = Process::start();
        let _back_end = share(&vm, &process, Options::default());
        process.expect(PAGE_SIZE);
        for _ in 0..2 {
            expect_nothing(&process);
            vm.insert_region(region()).unwrap();
            let missing = |page| vm.memory().pagers().last().unwrap().bitmap().is_missing(page);
            assert!(missing(600) && missing(3));
            process.expect(PLUGGED + 601 * PAGE_SIZE);
            assert!(!missing(600) && missing(3), "a fault fetches 2 MiB");
            let at = GuestAddress(PLUGGED + PAGE_SIZE);
            assert_eq!(vm.memory().read_obj::<u64>(at).unwrap(), word_of(at.0));
            vm.remove_region(START).unwrap();
            expect_nothing(&process);
        }
        vm.insert_region(region()).unwrap();
        vm.start_fill(FillRate::Unlimited).unwrap();
        finished.recv_timeout(PATIENCE).unwrap().unwrap();
        process.expect(PLUGGED + 2 * PAGE_SIZE);
        // After post-copy, too.
        vm.remove_region(START).unwrap();
        expect_nothing(&process);
        vm.insert_region(LazyRegion::zeroed(9, START, LEN)).unwrap();
        assert_eq!(process.read(PLUGGED + 8).recv_timeout(PATIENCE), Ok(0));
        process.expect(PAGE_SIZE);
    }
}

#[test]
fn back_end_without_slots_refuses_regions() {
    if image().is_none() {
        return;
    }
    for engine in engines() {
        let vm = attach(builder(engine).build().unwrap()).unwrap();
        let process = Process::start();
        let options = Options::default().unused(Features::CONFIGURE_MEM_SLOTS);
        let back_end = share(&vm, &process, options);
        for refused in [vm.insert_region(region()), vm.remove_region(GuestAddress(0))] {
            let error = refused.unwrap_err();
            let Error::Share(error) = error else { panic!("{error}") };
            assert!(matches!(error.kind(), ErrorKind::NoMemSlots), "{error}");
        }
        assert_eq!(vm.memory().num_regions(), 1);
        process.expect(PAGE_SIZE);
        // Without the back-end nothing hinders the change.
        drop(back_end);
        vm.insert_region(region()).unwrap();
    }
}
