// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory in a guest_memfd, on the crate's handles. On a kernel without such files, the refusal is
//! what is tested.

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::*;
use demand_paging::demand_kvm::GUEST_MEMFD_LIMITS;
use demand_paging::demand_memory::{FaultPath, PAGE_SIZE};
use demand_paging::demand_source::LocalFile;
use demand_paging::{
    BackingKind, Engine, EngineChoice, Error, Lazy, LazyBuilder, LazyMemory, LazyRegion,
};
use test_support::host::skip_without_patch;
use vm_memory::{Bytes, GuestAddress};

const KIND: BackingKind = BackingKind::GuestMemfd;

/// Builds memory; on a kernel that has no such memory, checks the refusal.
fn build(builder: LazyBuilder) -> Option<LazyMemory> {
    let features = demand_kvm::probe().kvm.unwrap();
    match builder.backing(KIND).build() {
        Ok(memory) => Some(memory),
        Err(error) => {
            assert_eq!(features.guest_memfd_flags & 1, 0, "{error}");
            assert!(matches!(error, Error::Backing(_)), "{error:?}");
            None
        }
    }
}

#[test]
fn guest_sums_right_on_guest_memfd() {
    let Some(image) = image() else { return };
    let (sender, finished) = channel();
    let builder = lazy(image.path()).on_finish(move |outcome| drop(sender.send(outcome)));
    let Some(memory) = build(builder) else { return };
    assert!(memory.limits().ends_with(&GUEST_MEMFD_LIMITS));
    let lazily = demand_kvm::probe().kvm.unwrap().guest_memfd_userfault.works();
    if !lazily {
        // All of it is read first.
        skip_without_patch("KVM Userfault for guest_memfd");
    }
    assert_eq!(memory.engine(), lazily.then_some(Engine::KvmUserfault));
    let before: u64 = memory.memory().read_obj(GuestAddress(0x1000)).unwrap();
    memory.memory().write_obj(before, GuestAddress(0x1000)).unwrap();
    let vm = attach(memory).unwrap();
    let sum = run(&mut vcpu(&vm)).unwrap();
    check(image.path(), sum).unwrap();
    finished.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    let filled = vm.stats().path(FaultPath::Fill).pages;
    assert_eq!(filled == 0, lazily, "{filled} pages were read first");
    let sum = run(&mut vcpu_numbered(&vm, 1)).unwrap();
    check(image.path(), sum).unwrap();
}

#[test]
fn engines_that_cannot_trap_are_refused() {
    let Some(image) = image() else { return };
    let known = engines();
    for engine in [Engine::Uffd, Engine::UffdPoison].into_iter().filter(|it| known.contains(it)) {
        let only = |lazy: Lazy| {
            let builder = self::lazy(image.path()).engine(EngineChoice::Only(engine));
            builder.lazy(lazy).backing(KIND).build()
        };
        for lazy in [Lazy::Auto, Lazy::Require] {
            match only(lazy) {
                Err(error @ (Error::Arm(_) | Error::Backing(_))) => {
                    assert!(error.to_string().contains("guest-memfd"), "{error}");
                }
                outcome => panic!("{outcome:?}"),
            }
        }
    }
}

#[test]
fn region_of_guest_memfd_comes_and_goes() {
    let Some(image) = image() else { return };
    let Some(memory) = build(lazy(image.path())) else { return };
    let lazily = memory.engine().is_some();
    let vm = attach(memory).unwrap();
    let start = GuestAddress(1 << 30);
    let source = Arc::new(LocalFile::open(image.path()).unwrap());
    vm.insert_region(LazyRegion::new(7, start, SIZE, source)).unwrap();
    let at = GuestAddress(start.0 + SIZE - PAGE_SIZE);
    let last: u64 = vm.memory().read_obj(at).unwrap();
    let same: u64 = vm.memory().read_obj(GuestAddress(SIZE - PAGE_SIZE)).unwrap();
    assert_eq!(last, same);
    let trapping = vm.slots().iter().filter(|slot| slot.is_trapping()).count();
    assert_eq!(trapping, if lazily { 2 } else { 0 });
    vm.remove_region(start).unwrap();
    assert!(vm.memory().read_obj::<u64>(at).is_err());
}
