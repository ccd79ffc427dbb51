// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A test of the method by which user space detects that KVM's own accesses respect the bitmap.

use kvm_bindings::{kvm_userspace_memory_region, kvm_userspace_memory_region2};
use kvm_ioctls::{Kvm, VcpuExit};
use test_support::host::{skip, skip_without_patch};

use crate::guest::{Backing, EXIT_USERFAULT, PAGE, Shared, USERFAULT};

/// Address of the page that holds the reset vector, and the vector's offset in it.
const RESET_GPA: u64 = 0xffff_f000;
const RESET_OFFSET: usize = 0xff0;

#[test]
fn outsb_at_the_reset_vector_tells() {
    let Ok(kvm) = Kvm::new() else { return skip("/dev/kvm is needed") };
    let [data, code, bitmap] = [(); 3].map(|()| Shared::new(Backing::Shmem, PAGE).expect("memory"));
    code.put(RESET_OFFSET, &[0x6e]);
    bitmap.set(0);
    let vm = kvm.create_vm().expect("vm");
    let region = kvm_userspace_memory_region {
        guest_phys_addr: RESET_GPA,
        memory_size: PAGE as u64,
        userspace_addr: code.address(),
        ..Default::default()
    };
    // SAFETY: the mapping lives until the VM is dropped, as does the one below.
    unsafe { vm.set_user_memory_region(region) }.expect("code");
    let mut region = kvm_userspace_memory_region2 {
        slot: 1,
        flags: USERFAULT,
        memory_size: PAGE as u64,
        userspace_addr: data.address(),
        ..Default::default()
    };
    region.pad2[0] = bitmap.address();
    // SAFETY: as above.
    match unsafe { vm.set_user_memory_region2(region) } {
        Err(error) if [libc::EINVAL, libc::ENOTTY].contains(&error.errno()) => {
            return skip_without_patch("KVM_MEM_USERFAULT");
        }
        result => result.expect("slot"),
    }
    // The vCPU is in its reset state: DS and SI are 0.
    let mut vcpu = vm.create_vcpu(0).expect("vcpu");
    for _ in 0..2 {
        match vcpu.run().expect("KVM_RUN") {
            VcpuExit::MemoryFault { flags: EXIT_USERFAULT, gpa: 0, size: 4096 } => (),
            other => panic!("{other:?}"),
        }
    }
    data.put(0, &[0x5a]);
    bitmap.clear(0);
    match vcpu.run().expect("KVM_RUN") {
        VcpuExit::IoOut(_, [0x5a]) => (),
        other => panic!("{other:?}"),
    }
    drop((vcpu, vm));
    drop((data, code, bitmap));
}
