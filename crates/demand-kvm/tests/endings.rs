// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ends of a process while KVM itself waits for a page that is never served: a guest with
//! interrupts under `uffd`, for whose page KVM waits on a kernel thread (async page fault). Closing
//! the VM waits for that thread, and no signal ends the wait.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::mem;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use demand_kvm::Engine;
use demand_memory::{BackingKind, PAGE_SIZE};
use demand_source::{Completion, Extent, PageSource, Request, SourceError};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use test_support::host::{free_units, huge_pages, is_lab, shared_memory_kib, skip, threads_of};

const PAGES: u64 = 2048;
/// The interrupt flag of RFLAGS. With interrupts disabled KVM waits on the vCPU's thread.
const IF: u64 = 1 << 9;
/// Environment variables that turn a test process into the VMM under test.
const ENDING: &str = "ENDING";
const KIND: &str = "ENDING_KIND";
const BY_CALL: &str = "ENDING_BY_CALL";

const ENDINGS: [&str; 8] = [
    "stopped",
    "exit when stopped",
    "killed when stopped",
    "unread",
    "running",
    "panic",
    "exit",
    "killed",
];

/// A source that never answers.
struct Away(AtomicBool);

impl PageSource for Away {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size() })
    }

    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        mem::forget((request, completer));
        self.0.store(true, Ordering::Release);
        completion
    }
}

/// Hides the device, so that the userfaultfd comes from the system call.
fn hide_device() {
    // SAFETY: the strings outlive the calls, which change only the namespace of this process.
    let hidden = unsafe {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(c"none".as_ptr(), c"/".as_ptr(), c"".as_ptr(), private, std::ptr::null())
                == 0
            && libc::mount(
                c"/dev/null".as_ptr(),
                c"/dev/userfaultfd".as_ptr(),
                c"".as_ptr(),
                libc::MS_BIND,
                std::ptr::null(),
            ) == 0
    };
    assert!(hidden, "{}", std::io::Error::last_os_error());
}

/// The VMM, in a process that the other test starts: ends in the way that `ENDING` names. In the
/// test process itself this tests nothing.
#[test]
fn vmm() {
    let Ok(ending) = std::env::var(ENDING) else { return };
    if std::env::var_os(BY_CALL).is_some() {
        hide_device();
    }
    let kind = std::env::var(KIND).unwrap().parse().unwrap();
    let kvm = kvm().unwrap();
    let source = Arc::new(Away(AtomicBool::new(false)));
    let pager = pager(kind, PAGES, source.clone());
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let mapping = service.arm_guest([&pager], Engine::Uffd.vcpu_trap()).unwrap().remove(0);
    // After the userfaultfd, so that the descriptors' numbers have the wrong order.
    let machine = Machine::with_interrupts(&kvm, Engine::Uffd);
    let slot = machine.slot_over(mapping, Engine::Uffd);
    let handler = handler(&slot);
    let mut cpu = machine.vcpu(0);
    machine.load(&mut cpu, Program::Check, Pages::run(0, 1));
    let mut regs = cpu.vcpu.get_regs().unwrap();
    regs.rflags |= IF;
    cpu.vcpu.set_regs(&regs).unwrap();
    let kick = cpu.kick.clone();
    if ending == "unread" {
        service.stop();
    }
    let vcpu = thread::spawn(move || cpu.run(&handler));
    while ending != "unread" && !source.0.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(1));
    }
    a_while();
    assert!(!vcpu.is_finished());
    if !["running", "panic", "exit", "killed"].contains(&&*ending) {
        // A vCPU counts as stopped while KVM waits on its behalf. While any of its pages is mapped,
        // as the kick's is, closing the VM's descriptor does not end the VM.
        kick.kick();
        assert_eq!(vcpu.join().unwrap(), Err(Stopped::Kicked));
        drop(kick);
    }
    println!("waiting");
    std::io::stdout().flush().unwrap();
    match &*ending {
        "stopped" | "unread" => {
            pager.stop();
            service.stop();
            // Every order of dropping must work.
            drop((service, pager, machine, slot));
        }
        "running" => drop((slot, machine, service, pager)),
        "panic" => panic!("the VMM panics"),
        "exit" | "exit when stopped" => std::process::exit(0),
        _ => thread::sleep(Duration::from_secs(1000)),
    }
}

fn start(ending: &str, kind: BackingKind, by_call: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "vmm", "--nocapture"]);
    command.env(ENDING, ending).env(KIND, kind.to_string());
    if by_call {
        command.env(BY_CALL, "1");
    }
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn ended_vmm_leaves_no_process_and_no_page() {
    if !is_lab() {
        // A process that does not end would stay on the machine.
        return skip("ends of a VMM while KVM waits for a page are tried in the lab only");
    }
    let _pool = huge_pages(PAGES / 512);
    let shmem_cases = [true, false].map(|by_call| (BackingKind::Shmem, by_call, &ENDINGS[..]));
    let huge = (BackingKind::Hugetlb2M, true, &ENDINGS[..3]);
    for (kind, by_call, endings) in shmem_cases.into_iter().chain([huge]) {
        for &ending in endings {
            let case = format!("{ending} on {kind}, by system call: {by_call}");
            let before = (shared_memory_kib(), free_units(kind));
            let mut child = start(ending, kind, by_call);
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let waits = |line: std::io::Result<String>| line.unwrap().contains("waiting");
            assert!(lines.any(waits), "{case}: it never waited: {}", threads_of(child.id()));
            if ending.starts_with("killed") {
                child.kill().unwrap();
            }
            let begun = Instant::now();
            while child.try_wait().unwrap().is_none() {
                let late = begun.elapsed() > Duration::from_secs(8);
                assert!(!late, "{case}: it does not end: {}", threads_of(child.id()));
                thread::sleep(Duration::from_millis(5));
            }
            // Kernel threads may hold the memory a moment longer.
            while shared_memory_kib() > before.0 + 64 || free_units(kind) < before.1 {
                let late = begun.elapsed() > Duration::from_secs(10);
                assert!(
                    !late,
                    "{case}: {} KiB, {} units left",
                    shared_memory_kib(),
                    free_units(kind)
                );
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
