// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests see the source's bytes under every engine, whatever is read first.

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::*;
use demand_paging::demand_kvm::SlotError;
use demand_paging::demand_memory::{FaultPath, PAGE_SIZE};
use demand_paging::demand_source::{LocalFile, PageSource, ZeroPadded, to_usize};
use demand_paging::{BackingKind, Engine, EngineChoice, Error, FillRate, Lazy, LazyBuilder};
use kvm_bindings::{Msrs, kvm_msr_entry};
use test_support::host::{skip, skip_without_patch};
use test_support::image::{far, word_of};
use test_support::wait::until;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Time in which memory of this size is filled, however busy the machine is.
const FILLED: Duration = Duration::from_secs(60);

#[test]
fn guest_sums_right_under_each_engine() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, (engine, _)| {
        let (sender, finished) = channel();
        let memory = builder.on_finish(move |outcome| drop(sender.send(outcome))).build().unwrap();
        assert_eq!(memory.engine(), Some(engine));
        let vm = attach(memory).unwrap();
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
        finished.recv_timeout(FILLED).unwrap().unwrap();
        assert!(vm.is_finished());
        // The VM runs on without demand paging.
        let sum = run(&mut vcpu_numbered(&vm, 1)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

#[test]
fn memory_can_be_used_before_it_is_attached() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, _| {
        let memory = builder.build().unwrap();
        let before: u64 = memory.memory().read_obj(GuestAddress(0x1000)).unwrap();
        // It replaces nothing that the guest sums.
        memory.memory().write_obj(before, GuestAddress(0x1000)).unwrap();
        let vm = attach(memory).unwrap();
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

#[test]
fn fill_completes_memory_without_guest() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, _| {
        let (sender, finished) = channel();
        let builder = builder.fill(FillRate::Unlimited);
        let memory = builder.on_finish(move |outcome| drop(sender.send(outcome))).build().unwrap();
        let vm = attach(memory).unwrap();
        finished.recv_timeout(FILLED).unwrap().unwrap();
        assert_eq!(vm.stats().path(FaultPath::Fill).pages, PAGES);
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

#[test]
fn memory_that_is_off_is_read_first() {
    let Some(image) = image() else { return };
    let memory = lazy(image.path()).lazy(Lazy::Off).build().unwrap();
    assert_eq!((memory.engine(), memory.limits().len()), (None, 0));
    let vm = attach(memory).unwrap();
    assert!(vm.is_finished() && vm.slots().iter().all(|slot| !slot.is_trapping()));
    assert_eq!(vm.stats().path(FaultPath::Fill).pages, PAGES);
    let sum = run(&mut vcpu(&vm)).unwrap();
    check(image.path(), sum).unwrap();
    vm.finish().unwrap();
}

#[test]
fn image_of_any_length_fills_memory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [7; 10_001]).unwrap();
    let image: Arc<dyn PageSource> = Arc::new(LocalFile::open(file.path()).unwrap());
    let content = |builder: LazyBuilder| {
        let memory = builder.lazy(Lazy::Off).build()?;
        let mut bytes = vec![0xee; to_usize(memory.memory().last_addr().0 + 1)];
        memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes[..10_001].iter().all(|byte| *byte == 7));
        assert!(bytes[10_001..].iter().all(|byte| *byte == 0));
        Ok::<_, Error>(bytes.len())
    };
    assert_eq!(content(LazyBuilder::new(image.clone())).unwrap(), 12_288);
    // Longer memory needs the word that zeros are right there.
    let longer = LazyBuilder::new(image.clone()).region(GuestAddress(0), 16_384);
    let error = content(longer).unwrap_err();
    assert!(error.to_string().contains("only 12288 bytes"), "{error}");
    let padded = Arc::new(ZeroPadded::new(image, 16_384));
    assert_eq!(content(LazyBuilder::new(padded)).unwrap(), 16_384);
}

#[test]
fn regions_follow_each_other_in_the_source() {
    let Some(image) = image() else { return };
    let half = SIZE / 2;
    let memory = lazy(image.path())
        .region(GuestAddress(0), half)
        .region(GuestAddress(4 << 30), half)
        .lazy(Lazy::Off)
        .first_slot(7)
        .build()
        .unwrap();
    let starts: Vec<_> = memory.memory().iter().map(|region| region.start_addr().0).collect();
    assert_eq!(starts, [0, 4 << 30]);
    let words = |memory: &demand_paging::DemandMemory| {
        [0, 4 << 30].map(|at| memory.read_obj::<u64>(GuestAddress(at)).unwrap())
    };
    let read = words(memory.memory());
    let whole = std::fs::read(image.path()).unwrap();
    let expected = [0, half].map(|at| {
        u64::from_le_bytes(whole[usize::try_from(at).unwrap()..][..8].try_into().unwrap())
    });
    assert_eq!(read, expected);
    let vm = attach(memory).unwrap();
    assert_eq!(words(&vm.memory()), expected);
}

#[test]
fn zeroed_memory_needs_a_region() {
    let Some(_) = image() else { return };
    let error = LazyBuilder::zeroed().build().unwrap_err();
    assert!(matches!(error, Error::NoRegion), "{error}");
    let memory = LazyBuilder::zeroed().region(GuestAddress(0), SIZE).build().unwrap();
    memory.memory().write_obj(0xf4u8, GuestAddress(SIZE - PAGE_SIZE)).unwrap();
    let vm = attach(memory).unwrap();
    assert!(vm.is_finished() && vm.engine().is_none());
    assert_eq!(run(&mut vcpu(&vm)).unwrap(), 0);
}

#[test]
fn empty_image_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = Arc::new(LocalFile::open(file.path()).unwrap());
    let error = LazyBuilder::new(image).lazy(Lazy::Off).build().unwrap_err();
    assert!(matches!(error, Error::Empty), "{error}");
}

#[test]
fn refused_vcpu_number_has_its_remedy() {
    let Some(_) = image() else { return };
    let memory = LazyBuilder::zeroed().region(GuestAddress(0), SIZE).build().unwrap();
    let vm = attach(memory).unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    let taken = vm.create_vcpu(0).unwrap_err().to_string();
    assert!(taken.ends_with("; use a number that no vCPU of this VM has"), "{taken}");
    let high = vm.create_vcpu(1 << 20).unwrap_err().to_string();
    assert!(high.contains("; use a number below KVM's maximum"), "{high}");
}

#[test]
fn finish_waits_for_the_last_page() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, _| {
        let vm = attach(builder.finish_by_caller().build().unwrap()).unwrap();
        let error = vm.finish().unwrap_err();
        assert!(matches!(error, Error::Missing { missing: PAGES }), "{error}");
        let (sender, complete) = channel();
        vm.on_complete(move || sender.send(()).unwrap_or_default());
        let mut attempts = 0;
        vm.before_finish(move || {
            attempts += 1;
            if attempts == 1 { Err("the back-end is busy".into()) } else { Ok(()) }
        });
        vm.start_fill(FillRate::Unlimited).unwrap();
        complete.recv_timeout(FILLED).unwrap();
        let error = vm.finish().unwrap_err();
        assert_eq!(error.to_string(), "cannot remove demand paging: the back-end is busy");
        assert!(!vm.is_finished());
        vm.finish().unwrap();
        vm.finish().unwrap();
        assert!(vm.is_finished());
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

/// KVM reads the pages that a vCPU's MSRs name; they are fetched before.
#[test]
fn own_pages_arrive_before_msrs_are_set() {
    let Some(image) = image() else { return };
    each(image.path(), |builder, (engine, kind)| {
        let vm = attach(builder.finish_by_caller().build().unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let kvm = demand_paging::demand_kvm::open_kvm().unwrap();
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let clock = kvm_msr_entry { index: 0x4b56_4d01, data: 0x5001, ..Default::default() };
        // An emulating KVM may have no such MSR, and still the page is fetched first.
        vcpu.set_msrs(&Msrs::from_entries(&[clock]).unwrap()).unwrap();
        let slots = vm.slots();
        let bitmap = slots[0].pager().bitmap();
        assert!(!bitmap.is_missing(5));
        // Under `uffd` KVM's own access maps a whole unit.
        let whole = engine.faults_by_unit() && kind == BackingKind::Hugetlb2M;
        assert!(whole || bitmap.is_missing(6));
    });
}

/// A page that KVM writes for itself is provided by the fault service, and not overwritten later.
#[test]
fn kvm_waits_for_a_page_it_writes() {
    const CLOCK: u64 = 0x5800;
    let Some(image) = image() else { return };
    if !engines().contains(&Engine::KvmUserfault) {
        return skip_without_patch("KVM_MEM_USERFAULT");
    }
    let expected = std::fs::read(image.path()).unwrap();
    each(image.path(), |builder, (engine, _)| {
        if engine != Engine::KvmUserfault {
            return;
        }
        let vm = attach(builder.finish_by_caller().build().unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let clock = kvm_msr_entry { index: 0x4b56_4d00, data: CLOCK, ..Default::default() };
        // Not through the vCPU's handle, which would fetch the page before.
        assert_eq!(vcpu.fd().set_msrs(&Msrs::from_entries(&[clock]).unwrap()).unwrap(), 1);
        let slots = vm.slots();
        let bitmap = slots[0].pager().bitmap();
        assert!(!bitmap.is_missing(5) && bitmap.is_missing(6));
        assert_eq!(vm.stats().path(FaultPath::HypervisorInternal).faults, 1);
        let mut page = [0; to_usize(PAGE_SIZE)];
        vm.memory().read_slice(&mut page, GuestAddress(5 * PAGE_SIZE)).unwrap();
        let from_image = &expected[to_usize(5 * PAGE_SIZE)..][..page.len()];
        assert_ne!(page[0x800..0x80c], from_image[0x800..0x80c], "the time");
        assert_eq!(page[..0x800], from_image[..0x800]);
        assert_eq!(page[0x80c..], from_image[0x80c..]);
    });
}

/// The guest waits while the source fails, and resumes with the right bytes.
#[test]
fn failing_source_is_reported_and_retried() {
    let Some(_) = image() else { return };
    for engine in engines() {
        let (source, control) = far(SIZE);
        let page = PAGES - 2; // Not a hole, which is not read.
        control.fail([page]);
        let (sender, failures) = channel();
        let memory = LazyBuilder::new(Arc::new(source))
            .engine(EngineChoice::Only(engine))
            .lazy(Lazy::Require)
            .on_failure(move |failure| drop(sender.send(failure.error.to_string())))
            .build()
            .unwrap();
        let vm = attach(memory).unwrap();
        let memory = vm.memory().clone();
        let reader = std::thread::spawn(move || {
            memory.read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap()
        });
        assert!(failures.recv_timeout(FILLED).unwrap().contains("image"));
        until("the fetch waits for its next attempt", || vm.is_source_failing());
        assert!(!reader.is_finished());
        control.recover();
        assert_eq!(reader.join().unwrap(), word_of(page * PAGE_SIZE));
    }
}

#[test]
fn vm_of_the_wrong_type_is_refused() {
    let Some(image) = image() else { return };
    if !engines().contains(&Engine::KvmAttributes) {
        return skip("this KVM does not have the engine kvm-attributes");
    }
    let builder = lazy(image.path()).engine(EngineChoice::Only(Engine::KvmAttributes));
    let memory = builder.backing(BackingKind::Shmem).build().unwrap();
    let vm = demand_paging::demand_kvm::open_kvm().unwrap().create_vm().unwrap();
    let error = memory.attach(vm).unwrap_err();
    assert!(matches!(error, Error::Slot(SlotError::Attributes { .. })), "{error}");
    assert!(error.to_string().contains("Engine::create_vm"), "{error}");
}
