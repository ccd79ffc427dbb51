// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the exit for a page that the host's mapping cannot provide: the mapping of the memslot
//! has a userfaultfd that answers with SIGBUS, and the vCPU's own thread provides the page.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bare_guest::{Mode, start_at};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use test_support::host::{skip, skip_without_patch};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::signal::register_signal_handler;

use crate::guest;
use crate::guest::{Backing, CODE_GPA, MEMORY_GPA, PAGE, PAGES, Shared, UNIT_PAGES};

/// `add eax, [ebx]; add ebx, edx; dec ecx; jnz; out 0x80, al`, in 16-bit code: eax is the sum of
/// the pages' first words. A HLT would wait inside KVM, which has the interrupt controller.
const SUM: [u8; 13] =
    [0x67, 0x66, 0x03, 0x03, 0x66, 0x01, 0xd3, 0x66, 0x49, 0x75, 0xf5, 0xe6, 0x80];

/// The interrupt flag: without it KVM starts no asynchronous page fault.
const INTERRUPTS: u64 = 1 << 9;

/// Time within which KVM_RUN must return. It does so within milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

const UFFD_API: u64 = 0xaa;
/// SIGBUS; MISSING and MINOR faults of both backings.
const FEATURES: u64 = 1 << 7 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10;
/// MISSING and MINOR faults.
const MODES: u64 = 1 | 1 << 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// The argument of both `UFFDIO_REGISTER` and `UFFDIO_CONTINUE`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    mode: u64,
    result: u64,
}

vmm_sys_util::ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Api);
vmm_sys_util::ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Range);
vmm_sys_util::ioctl_iowr_nr!(UFFDIO_CONTINUE, 0xaa, 0x07, Range);

/// A guest whose memory is empty, and whose faults on it are reported to its vCPU alone.
struct Lazy {
    // Declared before the memory, so that it is dropped first.
    vcpu: VcpuFd,
    _vm: VmFd,
    uffd: OwnedFd,
    memory: Shared,
    populate: Shared,
    _code: Shared,
    unit_pages: usize,
}

impl Lazy {
    /// Creates a guest that is about to sum up its pages. Returns `None`, after printing the reason,
    /// if this host cannot do that.
    fn new(backing: Backing, rflags: u64) -> Option<Self> {
        let kvm = Kvm::new().map_err(|error| skip(&format!("/dev/kvm: {error}"))).ok()?;
        let memory = Shared::new(backing, PAGES * PAGE)
            .map_err(|error| skip(&format!("memory in {backing:?}: {error}")))
            .ok()?;
        let populate = memory.again().expect("mapped again");
        let uffd = arm(&memory)
            .map_err(|error| skip(&format!("a userfaultfd for the kernel's faults: {error}")))
            .ok()?;
        let vm = kvm.create_vm().expect("vm");
        // KVM starts asynchronous page faults only with its own local APIC.
        vm.create_irq_chip().expect("interrupt controllers");
        let code = Shared::new(Backing::Shmem, PAGE).expect("code");
        code.put(0, &SUM);
        for (slot, gpa, shared, length) in
            [(0, CODE_GPA, &code, PAGE), (1, MEMORY_GPA, &memory, PAGES * PAGE)]
        {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: length as u64,
                userspace_addr: shared.address(),
            };
            // SAFETY: the mapping lives until the VM is dropped.
            unsafe { vm.set_user_memory_region(region) }.expect("slot");
        }
        let vcpu = vm.create_vcpu(0).expect("vcpu");
        vcpu.set_cpuid2(&bare_guest::cpuid(&kvm, 0).expect("CPUID")).expect("CPUID");
        Mode::Real.set(&vcpu).expect("real mode");
        let start = start_at(CODE_GPA);
        let regs = kvm_regs {
            rbx: MEMORY_GPA,
            rcx: PAGES as u64,
            rdx: PAGE as u64,
            rflags: start.rflags | rflags,
            ..start
        };
        vcpu.set_regs(&regs).expect("regs");
        let unit_pages = if backing == Backing::Hugetlb { UNIT_PAGES } else { 1 };
        Some(Self { vcpu, _vm: vm, uffd, memory, populate, _code: code, unit_pages })
    }

    /// Runs the guest until it stops. Returns the missing page, or `None` if the guest is done.
    ///
    /// # Errors
    ///
    /// Those of KVM_RUN: EFAULT without the exit's data, or EINTR if it did not return.
    fn run(&mut self) -> Result<Option<usize>, kvm_ioctls::Error> {
        let _watchdog = Watchdog::start();
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x80, _) => Ok(None),
            VcpuExit::MemoryFault { flags: 0, gpa, size: 4096 } if gpa % PAGE as u64 == 0 => {
                Ok(Some(usize::try_from(gpa - MEMORY_GPA).expect("64 bits") / PAGE))
            }
            other => panic!("unexpected exit {other:?}"),
        }
    }

    /// Writes a unit's content through the other mapping, and maps it where the guest sees it.
    fn provide(&self, first: usize) {
        for page in first..first + self.unit_pages {
            self.populate.put(page * PAGE, &guest::content(page).to_le_bytes());
        }
        let length = (self.unit_pages * PAGE) as u64;
        let mut range = Range {
            start: self.memory.address() + (first * PAGE) as u64,
            length,
            mode: 0,
            result: 0,
        };
        // SAFETY: `range` is the structure that this ioctl reads and writes.
        let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_CONTINUE(), &mut range) };
        assert_eq!(result, 0, "UFFDIO_CONTINUE: {}", io::Error::last_os_error());
        assert_eq!(range.result, length);
    }
}

/// Registers a mapping with a new userfaultfd that answers faults with SIGBUS.
fn arm(memory: &Shared) -> io::Result<OwnedFd> {
    // SAFETY: the call takes only flags.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = libc::c_int::try_from(fd).expect("a descriptor");
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so no other code owns it.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = Api { api: UFFD_API, features: FEATURES, ioctls: 0 };
    // SAFETY: `api` is the structure that this ioctl reads and writes.
    if unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API(), &mut api) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut range =
        Range { start: memory.address(), length: (PAGES * PAGE) as u64, mode: MODES, result: 0 };
    // SAFETY: as above.
    if unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_REGISTER(), &mut range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(uffd)
}

/// Interrupts the thread that started it if it lives longer than [`PATIENCE`].
struct Watchdog {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watchdog {
    fn start() -> Self {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(libc::SIGUSR1, nothing).expect("a handler");
        // SAFETY: pthread_self has no preconditions.
        let watched = unsafe { libc::pthread_self() };
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            if stopped.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                // SAFETY: the watched thread joins this one in `drop`, so it still exists.
                unsafe { libc::pthread_kill(watched, libc::SIGUSR1) };
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the watchdog only waits");
        }
    }
}

/// Returns whether KVM reports the page that a vCPU could not access.
fn reported() -> bool {
    let Some(mut guest) = Lazy::new(Backing::Shmem, 0) else { return false };
    let _watchdog = Watchdog::start();
    match guest.vcpu.run() {
        Err(error) if error.errno() == libc::EFAULT => {
            skip_without_patch("KVM_EXIT_MEMORY_FAULT for pages that cannot be resolved");
            false
        }
        Ok(VcpuExit::MmioRead(MEMORY_GPA, _)) => {
            skip("this KVM emulates the guest's accesses, and takes those that fail for MMIO");
            false
        }
        Ok(VcpuExit::MemoryFault { flags: 0, gpa: MEMORY_GPA, size: 4096 }) => true,
        result => panic!("unexpected exit {result:?}"),
    }
}

/// Provides each unit when the guest first accesses it, and checks what the guest reads.
fn sum_up(rflags: u64) {
    if !reported() {
        return;
    }
    for backing in [Backing::Shmem, Backing::Hugetlb] {
        let Some(mut guest) = Lazy::new(backing, rflags) else { return };
        let mut missed = Vec::new();
        while let Some(page) = guest.run().expect("KVM_RUN") {
            // Without the page, the same exit again.
            assert_eq!(guest.run().expect("KVM_RUN"), Some(page));
            guest.provide(page);
            missed.push(page);
        }
        assert_eq!(missed, (0..PAGES).step_by(guest.unit_pages).collect::<Vec<_>>(), "{backing:?}");
        let sum = (0..PAGES).map(guest::content).fold(0, u32::wrapping_add);
        assert_eq!(guest.vcpu.get_regs().expect("regs").rax as u32, sum, "{backing:?}");
    }
}

#[test]
fn page_is_reported_without_interrupts() {
    sum_up(0);
}

#[test]
fn page_is_reported_with_interrupts() {
    sum_up(INTERRUPTS);
}
