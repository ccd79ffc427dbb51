// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of what only slots over a guest_memfd can get wrong: holes, which any access but the
//! guest's fills with zeros, and the change of a slot that is otherwise immutable.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_bindings::{KVM_MEM_GUEST_MEMFD, Msrs, kvm_msr_entry};

use crate::guest::{
    Access, Backing, GUEST_MEMFD_MMAP, Guest, LOG, MEMORY_GPA, PAGE, PAGES, USERFAULT, content,
    guest_memfd,
};
use crate::machine::{End, Machine, PORT, at, expect_input};

/// MSR that names kvm-clock's page.
const SYSTEM_TIME: u32 = 0x4b56_4d01;

/// Creates a machine whose memory is a single hole.
fn hole() -> Option<Machine> {
    let machine = Machine::new(Backing::GuestMemfd)?;
    machine.guest.memory.empty();
    assert!((0..PAGES).all(|page| !machine.guest.memory.has(page)));
    Some(machine)
}

/// Asserts that the machine stops at a hole, each time, and that no page is created for it.
fn expect_stop(machine: &mut Machine, page: usize) {
    for _ in 0..3 {
        assert_eq!(machine.run(), End::Missing(page));
        assert!(!machine.guest.memory.has(page), "page {page} was created");
    }
}

#[test]
fn guest_access_leaves_a_hole_alone() {
    let Some(mut guest) = Guest::new(Backing::GuestMemfd, USERFAULT) else { return };
    guest.memory.empty();
    for page in [0, 7, PAGES - 1] {
        assert_eq!(guest.load(page), Access::Missing(page));
        assert_eq!(guest.store(page, 1), Access::Missing(page));
        assert!(!guest.memory.has(page));
        guest.arrive(page);
        assert_eq!(guest.load(page), Access::Done(content(page)));
    }
    let refusal = guest.pre_fault(9).expect_err("page 9 is missing").errno();
    // Shadow paging does not support this ioctl.
    assert!([libc::EFAULT, libc::EOPNOTSUPP].contains(&refusal));
    assert!(!guest.memory.has(9));
}

#[test]
fn string_output_leaves_a_hole_alone() {
    let Some(mut machine) = hole() else { return };
    // rep outsb
    machine.program(&[0x67, 0xf3, 0x6e], |regs| {
        (regs.rsi, regs.rcx, regs.rdx) = (at(3, PAGE - 8), 16, PORT.into());
    });
    expect_stop(&mut machine, 3);
    assert!(machine.device.out.is_empty(), "{:?}", machine.device.out);
    machine.arrive(3);
    expect_stop(&mut machine, 4);
    machine.arrive(4);
    assert_eq!(machine.run(), End::Halt);
    assert_eq!(machine.device.out, machine.arrived(3, 2)[PAGE - 8..][..16]);
}

#[test]
fn string_input_leaves_a_hole_alone() {
    let Some(mut machine) = hole() else { return };
    // rep insb
    machine.program(&[0x67, 0xf3, 0x6c], |regs| {
        (regs.rdi, regs.rcx, regs.rdx) = (at(5, 0), 16, PORT.into());
    });
    expect_stop(&mut machine, 5);
    assert_eq!(machine.device.taken, 0);
    machine.arrive(5);
    assert_eq!(machine.run(), End::Halt);
    expect_input(&machine, 5, 0, 16);
}

#[test]
fn clock_writes_nothing_to_a_hole() {
    let Some(mut machine) = hole() else { return };
    machine.image(50, 64, &[0; 32]);
    let entry = kvm_msr_entry { index: SYSTEM_TIME, data: at(50, 64) | 1, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).expect("one");
    assert_eq!(machine.guest.vcpu.set_msrs(&msrs).expect("MSRs"), 1);
    machine.program(&[0x90], |_| ());
    for _ in 0..3 {
        assert_eq!(machine.run(), End::Missing(50));
        // The page may exist by now: KVM has mapped it for itself.
        assert!(machine.memory(50, 1) == [0; PAGE], "page 50 was written");
    }
    machine.arrive(50);
    assert_eq!(machine.run(), End::Halt);
    let (now, was) = (machine.memory(50, 1), machine.expected(50));
    assert_ne!(now[64..68], was[64..68], "the clock's version");
    assert_eq!((&now[..64], &now[96..]), (&was[..64], &was[96..]));
}

#[test]
fn only_the_flag_can_change() {
    let Some(guest) = Guest::new(Backing::GuestMemfd, USERFAULT) else { return };
    let refused = |region, errno| {
        assert_eq!(guest.set_region(region).map_err(|error| error.errno()), Err(errno));
    };
    let on = guest.region(USERFAULT);
    for flags in [0, USERFAULT] {
        refused(guest.region(flags | LOG), libc::EINVAL);
        let mut region = guest.region(flags);
        region.guest_phys_addr = MEMORY_GPA + (PAGES * PAGE) as u64;
        refused(region, libc::EINVAL);
        let mut region = guest.region(flags);
        region.flags &= !KVM_MEM_GUEST_MEMFD;
        refused(region, libc::EINVAL);
    }
    // The flag goes off only with the slot's file and offset.
    let mut region = guest.region(0);
    region.guest_memfd_offset = PAGE as u64;
    refused(region, libc::EINVAL);
    let other = guest_memfd(&guest.vm, PAGES * PAGE, GUEST_MEMFD_MMAP).expect("another file");
    region = guest.region(0);
    region.guest_memfd = other.as_raw_fd().cast_unsigned();
    refused(region, libc::EINVAL);
    region.guest_memfd = u32::MAX >> 1;
    refused(region, libc::EBADF);
    guest.set_region(on).expect("the same again");
    guest.set_flags(0).expect("flag off");
}

#[test]
fn file_that_cannot_be_mapped_is_refused() {
    let Some(guest) = Guest::new(Backing::GuestMemfd, 0) else { return };
    let file = guest_memfd(&guest.vm, PAGES * PAGE, 0).expect("a file");
    guest.remove_slot();
    let mut region = guest.region(USERFAULT);
    region.guest_memfd = file.as_raw_fd().cast_unsigned();
    assert_eq!(guest.set_region(region).map_err(|error| error.errno()), Err(libc::EINVAL));
    // Without the flag there is such a slot, and it cannot get the flag.
    region.flags &= !USERFAULT;
    guest.set_region(region).expect("a slot of private memory");
    region.flags |= USERFAULT;
    assert_eq!(guest.set_region(region).map_err(|error| error.errno()), Err(libc::EINVAL));
}

#[test]
fn guest_runs_while_the_flag_changes() {
    let Some(mut guest) = Guest::new(Backing::GuestMemfd, USERFAULT) else { return };
    for page in 0..PAGES {
        guest.arrive(page);
    }
    let mut regions = [guest.region(0), guest.region(USERFAULT)].into_iter().cycle();
    let (vm, done) = (&guest.vm, &AtomicBool::new(false));
    let vcpu = &mut guest.vcpu;
    thread::scope(|scope| {
        let changes = scope.spawn(move || {
            for _ in 0..200 {
                let region = regions.next().expect("endless");
                // SAFETY: the memory and the bitmap outlive the thread.
                unsafe { vm.set_user_memory_region2(region) }.expect("flags");
                thread::yield_now();
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            // Each change that turns the flag on makes every page fault again.
            for page in (0..PAGES).step_by(16) {
                assert_eq!(Guest::load_on(vcpu, page), Access::Done(content(page)));
            }
        }
        changes.join().expect("the changes");
    });
}
