// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ends: in every order of drops, at every moment, in bounded time, and never with zeros.

mod common;

use std::any::Any;
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use demand_paging::demand_kvm::PlainSlot;
use demand_paging::demand_memory::{Backing, MemfdBacking, PAGE_SIZE};
use demand_paging::demand_uffd::{Features, Modes, Userfaultfd};
use demand_paging::{BackingKind, EngineChoice, Error, FillRate, Lazy, LazyBuilder, LazyVm};
use test_support::image::{Control, far};
use test_support::wait::until;
use vm_memory::{Bytes, GuestAddress};

/// Longest time that an end may take while the source is silent.
const BOUND: Duration = Duration::from_secs(8);

/// Drops a part and returns the time that it took.
fn time_of(part: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    part();
    begun.elapsed()
}

/// Parts of a VM that a VMM holds, dropped in each order.
#[test]
fn parts_are_dropped_in_any_order() {
    let Some(image) = image_of(BackingKind::Hugetlb2M.unit()) else { return };
    each(image.path(), |builder, (engine, kind)| {
        drop(builder);
        let end = |order: &[usize]| {
            let builder = lazy(image.path()).engine(EngineChoice::Only(engine)).backing(kind);
            let vm = attach(
                builder.lazy(Lazy::Require).fill(FillRate::BytesPerSecond(1)).build().unwrap(),
            );
            let vm = vm.unwrap();
            let mut vcpu = vcpu(&vm);
            // Into the middle of memory.
            while !matches!(vcpu.step().unwrap(), demand_paging::Step::Exit(_)) {}
            let memory = vm.memory().clone();
            let below = (memory, vm.fd().clone(), vm.service().clone(), vm.slots());
            let parts: [Box<dyn Any>; 3] = [Box::new(vm), Box::new(vcpu), Box::new(below)];
            let mut parts = parts.map(Some);
            time_of(|| order.iter().for_each(|part| drop(parts[*part].take())))
        };
        for order in permutations(3) {
            // A busy machine may delay one end, but not each of several.
            let prompt = (0..4).map(|_| end(&order)).any(|took| took < PROMPT);
            assert!(prompt, "{order:?}: it never takes less than {PROMPT:?}");
        }
    });
}

/// The end drops what steps own, which may end the guest again.
#[test]
fn step_may_own_what_ends_the_guest() {
    struct Ends(Weak<LazyVm>);
    impl Drop for Ends {
        fn drop(&mut self) {
            self.0.upgrade().expect("the test has it").end();
        }
    }
    let Some(image) = image() else { return };
    let vm = Arc::new(attach(lazy(image.path()).build().unwrap()).unwrap());
    let owned = Ends(Arc::downgrade(&vm));
    vm.before_finish(move || {
        let _ = &owned;
        Ok(())
    });
    let (sender, ended) = channel();
    thread::spawn(move || {
        vm.end();
        sender.send(()).unwrap();
    });
    ended.recv_timeout(BOUND).expect("the end does not wait for itself");
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(count - 1);
    let with = |order: &Vec<usize>, at| {
        let mut order = order.clone();
        order.insert(at, count - 1);
        order
    };
    shorter.iter().flat_map(|order| (0..count).map(move |at| with(order, at))).collect()
}

/// A VM whose source holds back the page below the guest's code, which the guest sums first.
fn held(engine: demand_paging::Engine) -> (LazyVm, Arc<Control>, tempfile::NamedTempFile) {
    let (source, control) = far(SIZE);
    control.hold([(SIZE / PAGE_SIZE) / 2]);
    let builder = LazyBuilder::new(Arc::new(source)).engine(EngineChoice::Only(engine));
    let vm = attach(builder.lazy(Lazy::Require).build().unwrap()).unwrap();
    // The guest's code; the source's pages hold no code.
    let image = image().unwrap();
    let whole = std::fs::read(image.path()).unwrap();
    let code = usize::try_from(SIZE - PAGE_SIZE).unwrap();
    vm.memory().write_slice(&whole[code..], GuestAddress(SIZE - PAGE_SIZE)).unwrap();
    (vm, control, image)
}

/// Waits until the guest reaches the page that is held back.
fn await_guest(vm: &LazyVm) {
    // Sums go from the top down.
    let above = SIZE / 2 / PAGE_SIZE + 1;
    until("the guest reaches the held page", || {
        vm.memory().pagers().all(|pager| !pager.bitmap().is_missing(above))
    });
}

/// The vCPU's thread never says that it runs the vCPU, and is ended all the same.
#[test]
fn handle_ends_running_vcpu() {
    let Some(_) = image() else { return };
    for engine in engines() {
        let (vm, control, _image) = held(engine);
        let _release = control.release_at_the_end();
        let mut vcpu = vcpu(&vm);
        let guest = thread::spawn(move || run(&mut vcpu));
        await_guest(&vm);
        let took = time_of(|| drop(vm));
        assert!(took < BOUND, "{engine}: {took:?}");
        let error = guest.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Ended), "{engine}: {error}");
    }
}

/// A VM with a vCPU that no kick reaches: KVM reads an operand for it, from memory of the VMM that
/// another userfaultfd traps and nothing serves.
struct Stuck {
    vm: LazyVm,
    uffd: Arc<Userfaultfd>,
    guest: thread::JoinHandle<Error>,
    _slot: PlainSlot,
}

impl Stuck {
    /// Returns `None` if this host has no KVM.
    fn new() -> Option<Self> {
        const FOREIGN: u64 = 0x4000_0000;
        const CODE: u64 = 0x5000;
        let image = image()?;
        let vm = attach(lazy(image.path()).lazy(Lazy::Require).build().unwrap()).unwrap();
        // rep outsb; hlt.
        vm.memory().write_slice(&[0xf3, 0x6e, 0xf4], GuestAddress(CODE)).unwrap();
        let backing = MemfdBacking::new(BackingKind::Shmem, PAGE_SIZE).unwrap();
        let foreign = Arc::new(backing.map().unwrap());
        let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
        uffd.register(foreign.address().as_ptr() as u64, PAGE_SIZE, Modes::ALL).unwrap();
        let slot = PlainSlot::new(vm.fd().clone(), 50, GuestAddress(FOREIGN), foreign).unwrap();
        let mut vcpu = vcpu(&vm);
        let regs = kvm_bindings::kvm_regs {
            rip: CODE,
            rflags: 2,
            rsi: FOREIGN,
            rcx: 4,
            rdx: 0x90,
            ..Default::default()
        };
        vcpu.fd().set_regs(&regs).unwrap();
        let guest = thread::spawn(move || {
            loop {
                if let Err(error) = vcpu.step() {
                    return error;
                }
            }
        });
        let mut messages = Vec::new();
        until("KVM waits for the page", || uffd.read(&mut messages).unwrap() > 0);
        Some(Stuck { vm, uffd, guest, _slot: slot })
    }

    /// Ends KVM's wait, and the vCPU.
    fn release(self) {
        self.uffd.close();
        assert!(matches!(self.guest.join().unwrap(), Error::Ended));
    }
}

#[test]
fn stuck_vcpu_delays_the_end_briefly() {
    let Some(stuck) = Stuck::new() else { return };
    let (tell, told) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let took = time_of(|| stuck.vm.end());
            let _ = tell.send(took);
        });
        let took = told.recv_timeout(Duration::from_secs(20));
        // An end that waits for the vCPU must not keep this test.
        stuck.uffd.close();
        let took = took.expect("the end waits for the vCPU");
        assert!(took < BOUND, "{took:?}");
    });
    stuck.release();
}

/// The first end waits four seconds for the vCPU.
#[test]
fn concurrent_end_waits_for_the_first() {
    let Some(stuck) = Stuck::new() else { return };
    let vm = &stuck.vm;
    thread::scope(|scope| {
        scope.spawn(|| vm.end());
        until("the end begins", || matches!(vm.finish(), Err(Error::Ended)));
        vm.end();
        assert!(vm.slots().is_empty(), "the guest has not ended");
    });
    stuck.release();
}

/// After the end nothing runs and nothing reads, whatever is still held.
#[test]
fn ended_vm_gives_errors_only() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, (engine, _)| {
        let vm = attach(builder.build().unwrap()).unwrap();
        let mut vcpu = vcpu(&vm);
        let memory = vm.memory().clone();
        vm.end();
        assert!(matches!(vm.create_vcpu(1), Err(Error::Ended)));
        assert!(matches!(vm.start_fill(FillRate::Unlimited), Err(Error::Ended)));
        assert!(matches!(vm.finish(), Err(Error::Ended)));
        assert!(matches!(vm.fetch_pages(&[GuestAddress(0x1000)]), Err(Error::Ended)));
        drop(vm);
        assert!(matches!(vcpu.step(), Err(Error::Ended)), "{engine}");
        memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap_err();
    });
}

/// A hook that blocks, such as the end of post-copy of a silent back-end, delays the end briefly.
#[test]
fn blocked_completion_does_not_delay_the_end() {
    let Some(_) = image() else { return };
    let (source, control) = far(SIZE);
    // Until then the memory is not complete, so the hook exists when it is.
    control.hold([3]);
    let builder = LazyBuilder::new(Arc::new(source)).lazy(Lazy::Require);
    let vm = attach(builder.fill(FillRate::Unlimited).build().unwrap()).unwrap();
    let (entered, inside) = channel();
    let (release, held) = channel::<()>();
    vm.before_finish(move || {
        let _ = entered.send(());
        let _ = held.recv();
        Ok(())
    });
    control.release();
    inside.recv_timeout(Duration::from_secs(20)).expect("the hook is called");
    let took = time_of(|| drop(vm));
    assert!(took < Duration::from_secs(3), "{took:?}");
    drop(release);
}

/// Memory that no VM ever gets ends the accesses that wait for it.
#[test]
fn unattached_memory_is_dropped() {
    let Some(_) = image() else { return };
    let (source, control) = far(SIZE);
    let _release = control.release_at_the_end();
    control.hold([3]);
    let memory = LazyBuilder::new(Arc::new(source)).build().unwrap();
    let reader = memory.memory().clone();
    let thread = thread::spawn(move || reader.read_obj::<u64>(GuestAddress(3 * PAGE_SIZE)));
    thread::sleep(Duration::from_millis(50));
    let took = time_of(|| drop(memory));
    assert!(took < PROMPT, "{took:?}");
    thread.join().unwrap().unwrap_err();
}

/// Reading all memory first ends when the memory is stopped.
#[test]
fn reading_first_can_be_stopped() {
    let Some(_) = image() else { return };
    let (source, control) = far(SIZE);
    let _release = control.release_at_the_end();
    control.hold([3]);
    let memory = LazyBuilder::new(Arc::new(source)).lazy(Lazy::Off).build().unwrap();
    let stop = memory.memory().clone();
    let attaching = thread::spawn(move || attach(memory).map(drop));
    thread::sleep(Duration::from_millis(50));
    assert!(!attaching.is_finished());
    stop.stop();
    let error = attaching.join().unwrap().unwrap_err();
    assert!(matches!(error, Error::Ended), "{error}");
}
