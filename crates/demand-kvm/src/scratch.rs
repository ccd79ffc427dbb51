// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scratch guests that test KVM's behaviour by running a few instructions.

use std::io::{self, Write};
use std::sync::Arc;

use demand_memory::{Backing, BackingKind, Mapping, MemfdBacking, MissingBitmap, PAGE_SIZE};
use kvm_ioctls::Kvm;
use vm_memory::GuestAddress;

use crate::abi::KVM_MEM_USERFAULT;
use crate::attributes::{self, PRIVATE};
use crate::memslot::{Bitmap, Memslot};
use crate::{Engine, SlotError, Trial};

/// Guest physical address of the page that holds an x86 processor's first instruction.
const RESET_PAGE: u64 = 0xffff_f000;

/// Guest physical address of the page before it. Instructions at the reset vector can address it:
/// the code segment begins at 0xffff0000.
const DATA_PAGE: u64 = RESET_PAGE - PAGE_SIZE;

/// Offset of the first instruction in its page.
const RESET: usize = 0xff0;

/// x86's `hlt`: the guest executes it if nothing stops it.
const HLT: u8 = 0xf4;

/// Runs a guest of one page, whose bit is set in the bitmap.
pub(crate) fn try_userfault(kvm: &Kvm) -> Trial {
    let Ok((mapping, bitmap)) = scratch(&[&[HLT; PAGE_SIZE as usize]]) else {
        return Trial::Untried;
    };
    let Ok(vm) = Engine::KvmUserfault.create_vm(kvm) else { return Trial::Untried };
    let (vm, start) = (Arc::new(vm), GuestAddress(RESET_PAGE));
    let bitmap = Some(Bitmap::of_bitmap(&bitmap));
    let slot = Memslot::new(vm.clone(), 0, start, mapping.clone(), bitmap, KVM_MEM_USERFAULT);
    let refused = match slot {
        Ok(_slot) => return run::userfault(&vm),
        Err(SlotError::Create { error, .. }) => error.errno(),
        Err(_) => return Trial::Untried,
    };
    // The error concerns the flag only if KVM accepts the same slot without it.
    match Memslot::new(vm, 0, start, mapping, None, 0) {
        Ok(_) => Trial::Refused { errno: refused },
        Err(_) => Trial::Untried,
    }
}

/// Runs a guest of one page, which is private at first.
pub(crate) fn try_attributes(kvm: &Kvm) -> Trial {
    let refused = |error: kvm_ioctls::Error| Trial::Refused { errno: error.errno() };
    let Ok((mapping, _)) = scratch(&[&[HLT; PAGE_SIZE as usize]]) else { return Trial::Untried };
    let vm = match Engine::KvmAttributes.create_vm(kvm) {
        Ok(vm) => Arc::new(vm),
        Err(crate::KvmError::CreateProtectedVm(error)) => return refused(error),
        Err(_) => return Trial::Untried,
    };
    if let Err(error) = attributes::change(&vm, RESET_PAGE, PAGE_SIZE, PRIVATE) {
        return refused(error);
    }
    match Memslot::new(vm.clone(), 0, GuestAddress(RESET_PAGE), mapping, None, 0) {
        Ok(_slot) => run::attributes(&vm),
        Err(_) => Trial::Untried,
    }
}

/// Runs a guest that makes KVM itself read a page whose bit is set: KVM emulates string
/// instructions on ports on every processor.
pub(crate) fn try_own_accesses(kvm: &Kvm) -> bool {
    // mov si, 0xe000; cs outsb; hlt
    const CODE: [u8; 6] = [0xbe, 0x00, 0xe0, 0x2e, 0x6e, HLT];
    let mut code = [HLT; PAGE_SIZE as usize];
    code[RESET..RESET + CODE.len()].copy_from_slice(&CODE);
    let Ok((mapping, bitmap)) = scratch(&[&[0; PAGE_SIZE as usize], &code]) else { return false };
    let Ok(vm) = Engine::KvmUserfault.create_vm(kvm) else { return false };
    let (vm, start) = (Arc::new(vm), GuestAddress(DATA_PAGE));
    let bitmap = Some(Bitmap::of_bitmap(&bitmap));
    match Memslot::new(vm.clone(), 0, start, mapping, bitmap, KVM_MEM_USERFAULT) {
        Ok(_slot) => run::own_access(&vm),
        Err(_) => false,
    }
}

/// Creates memory with these pages, and a bitmap in which the first of them is missing.
fn scratch(pages: &[&[u8; PAGE_SIZE as usize]]) -> io::Result<(Arc<Mapping>, Arc<MissingBitmap>)> {
    let size = pages.len() as u64 * PAGE_SIZE;
    let memory = MemfdBacking::new(BackingKind::Shmem, size, true).map_err(io::Error::other)?;
    let mapping = memory.map().map_err(io::Error::other)?;
    let mut file = memory.file().map(|file| &**file).ok_or(io::ErrorKind::Unsupported)?;
    for page in pages {
        file.write_all(&page[..])?;
    }
    Ok((Arc::new(mapping), Arc::new(MissingBitmap::new(1)?)))
}

/// Runs a new vCPU. It starts at the reset vector, so it needs no other state.
#[cfg(target_arch = "x86_64")]
mod run {
    use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

    use super::{DATA_PAGE, PAGE_SIZE, RESET_PAGE, attributes};
    use crate::Trial;
    use crate::abi::{KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};

    #[derive(PartialEq)]
    enum Exit {
        Fault { flags: u64, gpa: u64 },
        Halt,
        Other,
    }

    fn exit(vcpu: &mut VcpuFd) -> Exit {
        loop {
            return match vcpu.run() {
                Ok(VcpuExit::MemoryFault { flags, gpa, .. }) => Exit::Fault { flags, gpa },
                Ok(VcpuExit::Hlt) => Exit::Halt,
                Err(error) if error.errno() == libc::EINTR => continue,
                _ => Exit::Other,
            };
        }
    }

    pub(super) fn userfault(vm: &VmFd) -> Trial {
        let Ok(mut vcpu) = vm.create_vcpu(0) else { return Trial::Untried };
        match exit(&mut vcpu) {
            Exit::Fault { flags: KVM_MEMORY_EXIT_FLAG_USERFAULT, gpa: RESET_PAGE } => Trial::Works,
            _ => Trial::Ignored,
        }
    }

    pub(super) fn attributes(vm: &VmFd) -> Trial {
        let Ok(mut vcpu) = vm.create_vcpu(0) else { return Trial::Untried };
        let stopped = Exit::Fault { flags: KVM_MEMORY_EXIT_FLAG_PRIVATE, gpa: RESET_PAGE };
        if exit(&mut vcpu) != stopped {
            return Trial::Ignored;
        }
        // Once the page is no longer private, the guest must resume.
        match attributes::change(vm, RESET_PAGE, PAGE_SIZE, 0) {
            Ok(()) if exit(&mut vcpu) == Exit::Halt => Trial::Works,
            _ => Trial::Ignored,
        }
    }

    pub(super) fn own_access(vm: &VmFd) -> bool {
        let Ok(mut vcpu) = vm.create_vcpu(0) else { return false };
        exit(&mut vcpu) == Exit::Fault { flags: KVM_MEMORY_EXIT_FLAG_USERFAULT, gpa: DATA_PAGE }
    }
}

/// Other architectures only test whether KVM accepts the slot.
#[cfg(not(target_arch = "x86_64"))]
mod run {
    use kvm_ioctls::VmFd;

    use crate::Trial;

    pub(super) fn userfault(_vm: &VmFd) -> Trial {
        Trial::Works
    }

    pub(super) fn attributes(_vm: &VmFd) -> Trial {
        Trial::Untried
    }

    pub(super) fn own_access(_vm: &VmFd) -> bool {
        false
    }
}
