// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of accesses that wait for their page: KVM queues a message on the userfaultfd that was
//! registered with the VM.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use demand_uffd::{Event, Features, Userfaultfd};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region2};
use kvm_ioctls::VcpuFd;
use test_support::host::skip_without_patch;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::guest::{Backing, MEMORY_SLOT, PAGE, Shared, USERFAULT};
use crate::machine::{End, Machine, PORT, at, on_each};
use crate::pv::{WALL_CLOCK, expect_around, set_msr};

/// `struct kvm_userfault_fd`.
#[repr(C)]
struct UserfaultFd {
    fd: i32,
    flags: u32,
}

vmm_sys_util::ioctl_iow_nr!(KVM_SET_USERFAULT_FD, 0xae, 0xd7, UserfaultFd);

const SMBASE: u32 = 0x9e;
/// Offsets of the code and of the saved state from SMBASE, and the state's length.
const SMM_CODE: usize = 0x8000 / PAGE;
const SMM_STATE: usize = 0xf000 / PAGE;
/// Added to a slot's number, the slot of the same number that vCPUs in SMM use.
const IN_SMM: u32 = 1 << 16;

/// Longest time for which a test waits for something that must happen.
const SOON: Duration = Duration::from_secs(20);

/// A message: the slot, the page within the memory under test, and whether it is to be written.
type Gfn = (u32, usize, bool);

/// Registers a descriptor with the VM.
fn register(machine: &Machine, fd: i32, flags: u32) -> Result<(), errno::Error> {
    let request = UserfaultFd { fd, flags };
    // SAFETY: the request reads this structure only.
    match unsafe { ioctl_with_ref(&machine.guest.vm, KVM_SET_USERFAULT_FD(), &request) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}

/// Registers a new userfaultfd with the VM. Returns `None`, after printing the reason, if the
/// kernel does not support that.
fn registered(machine: &Machine) -> Option<Arc<Userfaultfd>> {
    let uffd = Userfaultfd::open(Features::GUEST_MEMORY).expect("userfaultfd");
    let fd = uffd.try_clone_fd().expect("descriptor");
    match register(machine, fd.as_raw_fd(), 0) {
        Err(error) if error.errno() == libc::ENOTTY => {
            skip_without_patch("KVM_SET_USERFAULT_FD");
            None
        }
        result => {
            result.expect("registered");
            Some(Arc::new(uffd))
        }
    }
}

/// Returns the messages that can be read now.
fn messages(uffd: &Userfaultfd) -> Vec<Gfn> {
    let mut events = Vec::new();
    uffd.read(&mut events).expect("read");
    let first = at(0, 0) / PAGE as u64;
    events
        .into_iter()
        .map(|event| match event {
            Event::Gfn { slot, gfn, write } => (slot, (gfn - first) as usize, write),
            other => panic!("unexpected {other:?}"),
        })
        .collect()
}

/// Returns the next messages.
fn next_messages(uffd: &Userfaultfd) -> Vec<Gfn> {
    let until = Instant::now() + SOON;
    while Instant::now() < until {
        let messages = messages(uffd);
        if !messages.is_empty() {
            return messages;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no message");
}

/// Closes the userfaultfd if the thread panics, so that a failed test does not wait for ever.
struct EndWaits<'a>(&'a Userfaultfd);

impl Drop for EndWaits<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.close();
        }
    }
}

/// Provides pages from another thread, and from other mappings, as the messages name them.
struct Provider {
    uffd: Arc<Userfaultfd>,
    memory: Shared,
    bitmap: Shared,
    contents: Vec<(usize, Vec<u8>)>,
}

impl Provider {
    fn new(machine: &Machine, uffd: &Arc<Userfaultfd>, pages: &[usize]) -> Self {
        Self {
            uffd: uffd.clone(),
            memory: machine.guest.memory.again().expect("memory"),
            bitmap: machine.guest.bitmap.again().expect("bitmap"),
            contents: pages.iter().map(|page| (*page, machine.expected(*page))).collect(),
        }
    }

    fn provide(&self, page: usize) {
        let (_, content) =
            self.contents.iter().find(|(known, _)| *known == page).expect("a page of the test");
        self.memory.put(page * PAGE, content);
        self.bitmap.clear(page);
        // Any range will do.
        self.uffd.wake(self.bitmap.address(), PAGE as u64).expect("wake");
    }
}

/// Makes an access on this thread while another one provides pages; returns the messages.
fn provided(
    machine: &mut Machine,
    uffd: &Arc<Userfaultfd>,
    pages: &[usize],
    access: impl FnOnce(&mut Machine),
) -> Vec<Gfn> {
    let provider = Provider::new(machine, uffd, pages);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let done = &done;
        let reader = scope.spawn(move || {
            let _end_waits = EndWaits(&provider.uffd);
            let mut read = Vec::new();
            while !done.load(Ordering::Acquire) {
                for message in messages(&provider.uffd) {
                    // The access waits, however long that takes.
                    thread::sleep(Duration::from_millis(50));
                    assert!(!done.load(Ordering::Acquire), "the access did not wait");
                    provider.provide(message.1);
                    read.push(message);
                }
                thread::sleep(Duration::from_millis(1));
            }
            read
        });
        let result = panic::catch_unwind(AssertUnwindSafe(|| access(machine)));
        done.store(true, Ordering::Release);
        let read = reader.join().expect("provider");
        result.unwrap_or_else(|cause| panic::resume_unwind(cause));
        read
    })
}

fn each_registered(test: impl Fn(&mut Machine, &Arc<Userfaultfd>)) {
    on_each(|machine| {
        if let Some(uffd) = registered(machine) {
            test(machine, &uffd);
        }
    });
}

#[test]
fn wall_clock_set_by_user_space_is_written() {
    each_registered(|machine, uffd| {
        machine.image(52, 64, &[0; 12]);
        let read = provided(machine, uffd, &[52], |machine| {
            set_msr(&machine.guest.vcpu, WALL_CLOCK, at(52, 64));
        });
        assert_eq!(read, [(MEMORY_SLOT, 52, true)]);
        let version = machine.memory(52, 1)[64];
        assert!(version > 0 && version % 2 == 0, "version {version}");
        expect_around(machine, 52, 64, 12);
    });
}

/// Both pages of an access are waited for, one after the other.
#[test]
fn wall_clock_may_cross_pages() {
    each_registered(|machine, uffd| {
        machine.image(52, PAGE - 8, &[0; 8]);
        machine.image(53, 0, &[0; 4]);
        let read = provided(machine, uffd, &[52, 53], |machine| {
            set_msr(&machine.guest.vcpu, WALL_CLOCK, at(52, PAGE - 8));
        });
        assert_eq!(read, [(MEMORY_SLOT, 52, true), (MEMORY_SLOT, 53, true)]);
        expect_around(machine, 52, PAGE - 8, 8);
        expect_around(machine, 53, 0, 4);
    });
}

#[test]
fn clock_pairing_is_written() {
    each_registered(|machine, uffd| {
        machine.image(54, 64, &[0; 64]);
        // vmmcall
        machine.program(&[0x0f, 0x01, 0xd9], |regs| {
            (regs.rax, regs.rbx, regs.rcx) = (9, at(54, 64), 0);
        });
        let read = provided(machine, uffd, &[54], |machine| assert_eq!(machine.run(), End::Halt));
        assert_eq!(read, [(MEMORY_SLOT, 54, true)]);
        // Without a clock source that is based on the TSC, KVM has no time to write.
        if machine.regs().rax as i32 == -libc::EOPNOTSUPP {
            assert_eq!(machine.memory(54, 1), machine.expected(54));
            return;
        }
        assert_eq!(machine.regs().rax, 0);
        assert_ne!(machine.memory(54, 1)[64..72], [0; 8], "the time");
        expect_around(machine, 54, 64, 64);
    });
}

/// Gives vCPUs in SMM the same memory, and puts SMRAM at a page of the memory under test.
fn use_smram(machine: &Machine, first: usize) {
    machine.guest.add_slots_in_smm();
    set_msr(&machine.guest.vcpu, SMBASE, at(first, 0));
}

/// `nop; nop`
const TWO_NOPS: [u8; 2] = [0x90; 2];

#[test]
fn smm_entry_waits_for_smram() {
    each_registered(|machine, uffd| {
        use_smram(machine, 100);
        let (code, state) = (100 + SMM_CODE, 100 + SMM_STATE);
        // rsm
        machine.image(code, 0, &[0x0f, 0xaa]);
        machine.program(&TWO_NOPS, |regs| regs.rbx = 0x1234_5678);
        machine.guest.vcpu.smi().expect("SMI");
        machine.arrive(code);
        let read = provided(machine, uffd, &[state], |machine| {
            assert_eq!(machine.run(), End::Halt);
        });
        assert_eq!(read, [(MEMORY_SLOT | IN_SMM, state, true)]);
        assert_eq!(machine.regs().rbx, 0x1234_5678);
        // The state is the last 512 bytes, and the content before it is the source's.
        let (now, was) = (machine.memory(state, 1), machine.expected(state));
        assert_eq!(now[..PAGE - 512], was[..PAGE - 512]);
        assert_ne!(now[PAGE - 512..], was[PAGE - 512..]);
    });
}

/// A vCPU is restored in SMM, and the page of its state arrives when RSM reads it.
#[test]
fn smm_exit_waits_for_smram() {
    each_registered(|machine, uffd| {
        use_smram(machine, 100);
        let (code, state) = (100 + SMM_CODE, 100 + SMM_STATE);
        // hlt; rsm
        machine.image(code, 0, &[0xf4, 0x0f, 0xaa]);
        machine.program(&TWO_NOPS, |regs| regs.rbx = 0x1234_5678);
        machine.arrive(code);
        machine.arrive(state);
        machine.guest.vcpu.smi().expect("SMI");
        assert_eq!(machine.run(), End::Halt);
        // The snapshot has the page as it is now, and the memory does not have it yet.
        let saved = machine.memory(state, 1);
        machine.image(state, 0, &saved);
        machine.guest.memory.put(state * PAGE, &[0; PAGE]);
        machine.guest.bitmap.set(state);
        let regs = kvm_regs { rbx: 0, ..machine.regs() };
        machine.guest.vcpu.set_regs(&regs).expect("regs");
        let read = provided(machine, uffd, &[state], |machine| {
            assert_eq!(machine.run(), End::Halt);
        });
        assert_eq!(read, [(MEMORY_SLOT | IN_SMM, state, false)]);
        assert_eq!(machine.regs().rbx, 0x1234_5678);
    });
}

/// Without the pointers the guest has no page tables with shadow paging, and on Intel.
#[test]
fn pdptrs_set_by_user_space_are_loaded() {
    each_registered(|machine, uffd| {
        machine.long_mode(at(310, 0));
        machine.image(310, 0x20, &(at(311, 0) | 1).to_le_bytes());
        for index in 0..8u64 {
            machine.image(311, index as usize * 8, &(index << 21 | 0x83).to_le_bytes());
        }
        machine.arrive(311);
        let mut sregs = machine.guest.vcpu.get_sregs().expect("sregs");
        (sregs.efer, sregs.cr0, sregs.cr3) = (0, 1 << 31 | 1 << 5 | 1, at(310, 0x20));
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        let read = provided(machine, uffd, &[310], |machine| {
            machine.guest.vcpu.set_sregs(&sregs).expect("sregs");
        });
        assert_eq!(read, [(MEMORY_SLOT, 310, false)]);
        machine.arrive(312);
        // mov ebx, [ebx]
        machine.program(&[0x8b, 0x1b], |regs| {
            (regs.rbx, regs.rdx) = (at(312, 0), PORT.into());
        });
        assert_eq!(machine.run(), End::Halt);
        assert_eq!((machine.regs().rbx as u32).to_le_bytes(), machine.expected(312)[..4]);
    });
}

/// Sets the wall clock of a page that does not arrive, on another thread, until `end` ends the
/// wait.
fn while_waiting(machine: &Machine, uffd: &Userfaultfd, page: usize, end: impl FnOnce()) {
    let vcpu = &machine.guest.vcpu;
    thread::scope(|scope| {
        let _end_waits = EndWaits(uffd);
        let access = scope.spawn(|| set_msr(vcpu, WALL_CLOCK, at(page, 64)));
        assert_eq!(next_messages(uffd), [(MEMORY_SLOT, page, true)]);
        thread::sleep(Duration::from_millis(50));
        assert!(!access.is_finished(), "the access does not wait");
        end();
        let until = Instant::now() + SOON;
        while !access.is_finished() {
            assert!(Instant::now() < until, "the access still waits");
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn end_of_registration_ends_the_wait() {
    each_registered(|machine, uffd| {
        let before = machine.memory(60, 1);
        while_waiting(machine, uffd, 60, || register(machine, -1, 0).expect("removed"));
        assert_eq!(machine.memory(60, 1), before);
        // Later accesses fail at once, as without the feature.
        set_msr(&machine.guest.vcpu, WALL_CLOCK, at(61, 64));
        assert_eq!(messages(uffd), []);
    });
}

/// KVM holds no file open, or the end of the process that serves it would end no wait.
#[test]
fn closed_userfaultfd_ends_the_wait() {
    each_registered(|machine, uffd| {
        let before = machine.memory(60, 1);
        while_waiting(machine, uffd, 60, || uffd.close());
        assert_eq!(machine.memory(60, 1), before);
        set_msr(&machine.guest.vcpu, WALL_CLOCK, at(61, 64));
    });
}

#[test]
fn new_userfaultfd_gets_the_message() {
    each_registered(|machine, uffd| {
        machine.image(60, 64, &[0; 12]);
        while_waiting(machine, uffd, 60, || {
            let other = registered(machine).expect("registered again");
            assert_eq!(next_messages(&other), [(MEMORY_SLOT, 60, true)]);
            Provider::new(machine, &other, &[60]).provide(60);
        });
        assert_ne!(machine.memory(60, 1)[64..76], [0; 12]);
    });
}

#[test]
fn bit_alone_ends_the_wait() {
    each_registered(|machine, uffd| {
        machine.image(60, 64, &[0; 12]);
        while_waiting(machine, uffd, 60, || machine.arrive(60));
        assert_ne!(machine.memory(60, 1)[64..76], [0; 12]);
    });
}

#[test]
fn memslots_change_while_an_access_waits() {
    each_registered(|machine, uffd| {
        machine.image(60, 64, &[0; 12]);
        let other = Shared::new(Backing::Shmem, PAGE).expect("memory");
        let mut region = kvm_userspace_memory_region2 {
            slot: 7,
            guest_phys_addr: 1 << 32,
            userspace_addr: other.address(),
            ..Default::default()
        };
        while_waiting(machine, uffd, 60, || {
            let begun = Instant::now();
            for _ in 0..3 {
                region.memory_size = PAGE as u64;
                machine.guest.set_region(region).expect("slot added");
                region.memory_size = 0;
                machine.guest.set_region(region).expect("slot removed");
            }
            assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            assert_eq!(messages(uffd), [], "the message was read before");
            machine.arrive(60);
        });
        assert_ne!(machine.memory(60, 1)[64..76], [0; 12]);
    });
}

#[test]
fn removal_of_the_slot_ends_the_wait() {
    each_registered(|machine, uffd| {
        let before = machine.memory(60, 1);
        while_waiting(machine, uffd, 60, || machine.guest.remove_slot());
        assert_eq!(machine.memory(60, 1), before);
        // The slot's return changes nothing for the access that is over.
        machine.guest.set_flags(USERFAULT).expect("slot");
        assert_eq!(machine.memory(60, 1), before);
    });
}

/// More vCPUs wait than one read returns, and the reader comes late.
#[test]
fn slow_reader_loses_no_message() {
    const VCPUS: usize = 40;
    each_registered(|machine, uffd| {
        let pages: Vec<_> = (400..400 + VCPUS).collect();
        let provider = Provider::new(machine, uffd, &pages);
        let vcpus: Vec<VcpuFd> =
            (1..=VCPUS as u64).map(|id| machine.guest.vm.create_vcpu(id).expect("vCPU")).collect();
        thread::scope(|scope| {
            let _end_waits = EndWaits(uffd);
            let accesses: Vec<_> = vcpus
                .iter()
                .zip(&pages)
                .map(|(vcpu, page)| scope.spawn(|| set_msr(vcpu, WALL_CLOCK, at(*page, 64))))
                .collect();
            // Each waiter has looked for its page again and again.
            thread::sleep(Duration::from_secs(1));
            let mut read: Vec<Gfn> = Vec::new();
            while read.len() < VCPUS {
                let next = next_messages(uffd);
                read.extend(next.iter());
                thread::sleep(Duration::from_millis(30));
            }
            assert!(accesses.iter().all(|access| !access.is_finished()));
            read.sort_unstable();
            let all: Vec<_> = pages.iter().map(|page| (MEMORY_SLOT, *page, true)).collect();
            assert_eq!(read, all);
            pages.iter().for_each(|page| provider.provide(*page));
        });
        assert_eq!(messages(uffd), []);
    });
}

/// Calls `during` while an access waits for page 60 and its message is unread; then lets the page
/// arrive. No message may be left.
fn while_unread(during: impl Fn(&Userfaultfd)) {
    each_registered(|machine, uffd| {
        let vcpu = &machine.guest.vcpu;
        thread::scope(|scope| {
            let _end_waits = EndWaits(uffd);
            let access = scope.spawn(|| set_msr(vcpu, WALL_CLOCK, at(60, 64)));
            thread::sleep(Duration::from_millis(200));
            assert!(!access.is_finished());
            during(uffd);
            machine.arrive(60);
        });
        assert_eq!(messages(uffd), []);
    });
}

#[test]
fn message_of_ended_wait_is_withdrawn() {
    while_unread(|_| {});
}

#[test]
fn other_process_reads_messages() {
    while_unread(|uffd| {
        let fd = uffd.try_clone_fd().expect("descriptor");
        let output = Command::new("dd").args(["bs=32", "count=1"]).stdin(fd).output();
        let message = output.expect("dd").stdout;
        assert_eq!((message.len(), message[0]), (32, 0x17));
        assert_eq!(message[8..16], (u64::from(MEMORY_SLOT) | 1 << 32).to_le_bytes());
        assert_eq!(message[16..24], (at(60, 0) / PAGE as u64).to_le_bytes());
    });
}

#[test]
fn wrong_descriptors_are_refused() {
    each_registered(|machine, uffd| {
        let refused = |fd, flags, errno| {
            assert_eq!(register(machine, fd, flags).expect_err("refused").errno(), errno);
        };
        let fd = uffd.try_clone_fd().expect("descriptor");
        refused(fd.as_raw_fd(), 1, libc::EINVAL);
        refused(machine.guest.vm.as_raw_fd(), 0, libc::EINVAL);
        refused(-2, 0, libc::EINVAL);
        refused(1 << 20, 0, libc::EBADF);
        // SAFETY: the call takes a number and returns a descriptor, which this test closes.
        let without_api = unsafe { libc::syscall(libc::SYS_userfaultfd, 0) } as i32;
        refused(without_api, 0, libc::EINVAL);
        // SAFETY: the descriptor is this test's.
        unsafe { libc::close(without_api) };
    });
}

/// Set in the environment of a process that is about to wait.
const WAITS: &str = "USERFAULT_TEST_WAITS";

/// Does nothing unless it is started by [`waiting_process`].
#[test]
fn process_waits_for_a_page() {
    if std::env::var_os(WAITS).is_none() {
        return;
    }
    let machine = Machine::new(Backing::Shmem).expect("lab");
    let uffd = registered(&machine).expect("lab");
    let vcpu = &machine.guest.vcpu;
    thread::scope(|scope| {
        scope.spawn(|| set_msr(vcpu, WALL_CLOCK, at(60, 64)));
        assert_eq!(next_messages(&uffd), [(MEMORY_SLOT, 60, true)]);
        // The parent waits for this file.
        std::fs::write(std::env::var_os(WAITS).expect("path"), "waits").expect("file");
    });
}

/// Starts a process with a thread that waits, and returns it when that is the case.
fn waiting_process() -> Option<Child> {
    registered(&Machine::new(Backing::Shmem)?)?;
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("waits");
    let child = Command::new(std::env::current_exe().expect("path"))
        .args(["notify::process_waits_for_a_page", "--exact", "--test-threads=1"])
        .env(WAITS, &file)
        .stdout(Stdio::null())
        .spawn()
        .expect("process");
    let until = Instant::now() + SOON;
    while !file.exists() {
        assert!(Instant::now() < until, "the process does not wait");
        thread::sleep(Duration::from_millis(10));
    }
    Some(child)
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the process is this one's child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

/// Asserts that the process ends soon by SIGKILL.
fn expect_killed(mut child: Child) {
    let until = Instant::now() + SOON;
    while Instant::now() < until {
        if let Some(status) = child.try_wait().expect("status") {
            assert_eq!(status.signal(), Some(libc::SIGKILL));
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("the process does not end");
}

#[test]
fn kill_ends_the_wait() {
    let Some(child) = waiting_process() else { return };
    signal(&child, libc::SIGKILL);
    expect_killed(child);
}

#[test]
fn stopped_process_can_be_killed() {
    let Some(child) = waiting_process() else { return };
    signal(&child, libc::SIGSTOP);
    thread::sleep(Duration::from_millis(100));
    signal(&child, libc::SIGCONT);
    thread::sleep(Duration::from_millis(100));
    signal(&child, libc::SIGSTOP);
    signal(&child, libc::SIGKILL);
    expect_killed(child);
}
