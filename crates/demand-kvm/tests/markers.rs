// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Markers in the guest's mapping (engine `uffd-poison`), with real guests.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use common::*;
use demand_kvm::{DemandSlot, Engine, FaultError, FaultHandler, SlotError};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, Pager, PathReport};
use demand_source::Threaded;
use test_support::host::skip;
use test_support::wait::until;

const ENGINE: Engine = Engine::UffdPoison;

/// 4 MiB: two units of 2 MiB, and two chunks of shared memory.
const PAGES: u64 = 1024;

/// Number of pages that get their markers at the first access to one of them, where a page is a
/// unit.
const CHUNK: u64 = 512;

/// Runs a test on a machine whose region is missing, for each backing.
fn on_each(
    source: impl Fn(BackingKind) -> Arc<Pager>,
    test: impl Fn(&Machine, &Arc<Pager>, DemandSlot, &FaultHandler),
) {
    let Some(kvm) = kvm_with(ENGINE) else { return };
    for kind in backings(PAGES * PAGE_SIZE) {
        println!("{ENGINE} on {kind}");
        let machine = Machine::new(&kvm, ENGINE);
        let pager = source(kind);
        let slot = machine.slot(&pager, ENGINE);
        let handler = handler(&slot);
        test(&machine, &pager, slot, &handler);
    }
}

fn from_file(kind: BackingKind) -> Arc<Pager> {
    file_pager(kind, PAGES)
}

/// Makes the vCPU touch a unit of each chunk, so that all others have markers.
fn touch(machine: &Machine, cpu: &mut Cpu, handler: &FaultHandler, pager: &Pager) {
    let chunks = (PAGES / (CHUNK * pager.unit_pages())).max(1);
    let pages = Pages { first: 0, count: chunks, stride: CHUNK as i64 };
    machine.load(cpu, Program::Copy { out: 0 }, pages);
    cpu.run(handler).unwrap();
}

/// Waits until a figure of the guest's path is this one: a message's fault is counted after its
/// faulter is woken.
fn expect_counted(pager: &Pager, figure: impl Fn(&PathReport) -> u64, wanted: u64) {
    until("all faults are counted", || figure(&pager.stats().path(FaultPath::Guest)) == wanted);
}

#[test]
fn one_fault_in_a_chunk_is_a_message() {
    on_each(from_file, |machine, pager, _slot, handler| {
        let mut cpu = machine.vcpu(0);
        for pages in [Pages::run(300, 212), Pages { first: 1023, count: 512, stride: -1 }] {
            machine.copy_and_compare(&mut cpu, handler, pages, 0, page);
        }
        let touched: u64 = 212 + 512;
        let faults = if pager.unit_pages() == 1 { touched } else { 2 };
        expect_counted(pager, |guest| guest.faults, faults);
        let guest = pager.stats().path(FaultPath::Guest);
        if pager.unit_pages() == 1 {
            assert_eq!((guest.faults, guest.pages), (touched, touched));
            let sizes: Vec<_> = guest.granularity_histogram.into_iter().collect();
            assert_eq!(sizes, [(PAGE_SIZE, touched)]);
            assert_eq!(cpu.stops, touched - PAGES / CHUNK);
        } else {
            // One chunk has 512 units.
            assert_eq!((guest.faults, guest.pages, cpu.stops), (2, PAGES, 1));
        }
        machine.copy_and_compare(&mut cpu, handler, Pages::run(512, 512), 0, page);
        assert_eq!(pager.stats().path(FaultPath::Guest).faults, guest.faults);
    });
}

#[test]
fn guest_writes_are_never_overwritten() {
    on_each(from_file, |machine, _pager, slot, handler| {
        check_writes_stay(machine, &slot, handler, || {});
    });
}

#[test]
fn two_vcpus_read_disjoint_and_shared_pages() {
    on_each(from_file, |machine, pager, _slot, handler| {
        let mut cpus = [machine.vcpu(0), machine.vcpu(1)];
        let even = Pages { first: 0, count: 200, stride: 2 };
        copy_by_two(machine, &mut cpus, handler, [even, Pages { first: 1, ..even }]);
        let same = Pages::run(600, 250);
        copy_by_two(machine, &mut cpus, handler, [same, same]);
        let arrived = if pager.unit_pages() == 1 { 650 } else { PAGES };
        expect_counted(pager, |guest| guest.pages, arrived);
    });
}

#[test]
fn vcpu_waiting_at_a_marker_can_be_kicked() {
    let gates = std::cell::RefCell::new(Vec::new());
    let source = |kind| {
        let gate = Gate::new(PAGES);
        gate.open();
        gates.borrow_mut().push(gate.clone());
        pager(kind, PAGES, Arc::new(Threaded::new(gate, 2).unwrap()))
    };
    on_each(source, |machine, pager, _slot, handler| {
        let gate = gates.borrow().last().unwrap().clone();
        let mut cpu = machine.vcpu(0);
        let kick = cpu.kick.clone();
        let pages = Pages::run(600, 3);
        touch(machine, &mut cpu, handler, pager);
        gate.shut();
        machine.load(&mut cpu, Program::Copy { out: 0 }, pages);
        let kicked = Err(Stopped::Fault(FaultError::Kicked { gpa: REGION + 600 * PAGE_SIZE }));
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| cpu.run(handler));
            a_while();
            assert!(!vcpu.is_finished());
            kick.kick();
            assert_eq!(vcpu.join().unwrap(), kicked);
        });
        assert!(cpu.vcpu.get_regs().is_ok() && pager.bitmap().is_missing(600));
        kick.clear();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| cpu.run(handler));
            a_while();
            assert!(!vcpu.is_finished());
            gate.open();
            assert_eq!(vcpu.join().unwrap(), Ok(()));
        });
        for index in 0..3 {
            assert!(machine.copied(index) == full_page(600 + index));
        }
    });
}

/// Pages that come by other ways than the vCPU's keep no marker, or one that the vCPU passes.
#[test]
fn pages_that_others_fetched_are_passed() {
    on_each(from_file, |machine, pager, _slot, handler| {
        let mut cpu = machine.vcpu(0);
        touch(machine, &mut cpu, handler, pager);
        let before = if pager.unit_pages() == 1 { PAGES / CHUNK } else { pager.unit_pages() };
        expect_counted(pager, |guest| guest.pages, before);
        fill(pager);
        for half in [0, 512] {
            machine.copy_and_compare(&mut cpu, handler, Pages::run(half, 512), 0, page);
        }
        assert_eq!(pager.stats().path(FaultPath::Guest).pages, before);
        if pager.unit_pages() == 1 {
            assert_eq!(cpu.stops, 0);
        }
    });
}

#[test]
fn no_vcpu_is_ever_ahead_of_the_content() {
    let torn = |kind| pager(kind, PAGES, Arc::new(Torn(PAGES)));
    on_each(torn, |machine, _pager, slot, handler| {
        check_content_is_first(machine, &slot, handler);
    });
}

/// Returns whether this thread blocks SIGBUS.
fn blocks_sigbus() -> bool {
    vmm_sys_util::signal::get_blocked_signals().unwrap().contains(&libc::SIGBUS)
}

#[test]
fn nothing_is_left_after_the_end() {
    let Some(kvm) = kvm_with(ENGINE) else { return };
    for kind in backings(PAGES * PAGE_SIZE) {
        println!("{ENGINE} on {kind}");
        let service = demand_uffd::FaultService::start(2).unwrap();
        let machine = Machine::new(&kvm, ENGINE);
        let pager = from_file(kind);
        let mapping = service.arm_guest([&pager], ENGINE.vcpu_trap()).unwrap().remove(0);
        let slot = machine.slot_over(mapping, ENGINE);
        let handler = handler(&slot);
        let mut cpu = machine.vcpu(0);
        touch(&machine, &mut cpu, &handler, &pager);
        assert!(slot.is_trapping() && blocks_sigbus());
        let error = slot.finish().unwrap_err();
        assert!(matches!(error, SlotError::PagesMissing { .. }), "{error}");
        fill(&pager);
        service.finish().unwrap();
        slot.finish().unwrap();
        assert!(!slot.is_trapping());
        // The vCPU had met its last marker, and its thread learns of that only now.
        signal_at(slot.mapping());
        assert_eq!(cpu.markers.resolve(&handler, cpu.kick.waiter()), Ok(true));
        let stops = cpu.stops;
        for half in [0, 512] {
            machine.copy_and_compare(&mut cpu, &handler, Pages::run(half, 512), 0, page);
        }
        assert_eq!(cpu.stops, stops);
        assert!(!blocks_sigbus());
    }
}

/// Sends this thread, which blocks it, the signal of a marker at the mapping's first byte.
fn signal_at(mapping: &demand_memory::Mapping) {
    /// The kernel's `siginfo_t`, as SIGBUS uses it.
    #[repr(C)]
    struct Info {
        signal: i32,
        error: i32,
        code: i32,
        address: u64,
        rest: [u64; 13],
    }
    let (signal, code) = (libc::SIGBUS, libc::BUS_MCEERR_AR);
    let address = mapping.address().as_ptr() as u64;
    let info = Info { signal, error: 0, code, address, rest: [0; 13] };
    assert_eq!(size_of_val(&info), size_of::<libc::siginfo_t>());
    // SAFETY: the call reads the structure, and the thread it names, which exists, is this one.
    let sent = unsafe {
        let (process, thread) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signal, &info)
    };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
}

/// The hardware loses a page that had arrived: the guest stops, and no fetch replaces what the
/// guest wrote.
#[test]
fn lost_memory_is_no_missing_page() {
    on_each(from_file, |machine, pager, slot, handler| {
        let mut cpu = machine.vcpu(0);
        machine.copy_and_compare(&mut cpu, handler, Pages::run(3, 5), 0, page);
        if let Err(error) = lose(slot.mapping(), 5 * PAGE_SIZE) {
            return skip(&format!("{CORRUPT}: {error} (it needs root and CONFIG_HWPOISON_INJECT)"));
        }
        machine.load(&mut cpu, Program::Copy { out: 0 }, Pages::run(3, 5));
        match cpu.run(handler) {
            Err(Stopped::Fault(error @ FaultError::HostMemory { gpa: Some(gpa), .. })) => {
                // The whole unit is lost.
                let first = if pager.unit_pages() == 1 { 5 } else { 3 };
                assert_eq!(gpa, REGION + first * PAGE_SIZE, "{error}");
                assert!(error.to_string().contains("content there is lost"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert!(!pager.bitmap().is_missing(5));
    });
}

/// The kernel's file that takes the number of a page to lose.
const CORRUPT: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";

/// Makes the kernel take a page of the mapping for one that the hardware has lost.
fn lose(mapping: &demand_memory::Mapping, offset: u64) -> std::io::Result<()> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let page = mapping.at(offset).as_ptr() as u64 / PAGE_SIZE;
    let mut entry = [0; 8];
    std::fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
    let entry = u64::from_le_bytes(entry);
    assert_eq!(entry & PRESENT, PRESENT, "the guest has just read it");
    std::fs::write(CORRUPT, (entry & FRAME).to_string())
}
