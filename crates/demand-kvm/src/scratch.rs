// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scratch guests that test KVM's behaviour by running a few instructions.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use demand_memory::{
    Backing, BackingError, BackingKind, Mapping, MemfdBacking, MissingBitmap, PAGE_SIZE, to_usize,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestAddress;

use crate::abi::KVM_MEM_USERFAULT;
use crate::attributes::{self, PRIVATE};
use crate::memslot::{Bitmap, Memslot, SlotMemory};
use crate::{Engine, KvmError, SlotError, Trial, guest_memfd};

/// Guest physical address of the page that holds an x86 processor's first instruction.
const RESET_PAGE: u64 = 0xffff_f000;

/// Guest physical address of the page before it. Instructions at the reset vector can address it:
/// the code segment begins at 0xffff0000.
const DATA_PAGE: u64 = RESET_PAGE - PAGE_SIZE;

/// Length of a page, in bytes.
const PAGE_BYTES: usize = to_usize(PAGE_SIZE);

/// Offset of the first instruction in its page.
const RESET: usize = 0xff0;

/// x86's `hlt`: the guest executes it if nothing stops it.
const HLT: u8 = 0xf4;

/// The place where the parts of a scratch guest are closed. KVM takes grace periods of RCU to
/// delete a memslot and to close a VM, which is most of the time that a trial takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// On the calling thread, before the trial returns.
    Here,
    /// On a thread that ends when all is closed.
    Beside,
}

impl Ending {
    fn close(self, parts: impl Send + 'static) {
        match self {
            Ending::Here => drop(parts),
            // Without another thread, the parts are closed here.
            Ending::Beside => {
                let _ = thread::Builder::new().name("probe".into()).spawn(move || drop(parts));
            }
        }
    }
}

/// The outcome of trying KVM Userfault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Userfault {
    /// Whether a vCPU stops at a missing page.
    pub(crate) trial: Trial,
    /// Whether KVM's own accesses stop there; `None` if vCPUs do not, or if that could not be tried.
    pub(crate) own_accesses: Option<bool>,
}

/// Runs a guest of two missing pages: its code, and then a page that the code makes KVM itself
/// read. KVM emulates string instructions on ports on every processor.
pub(crate) fn try_userfault(kvm: &Kvm, ending: Ending) -> Result<Userfault, KvmError> {
    let vm = Arc::new(create_vm(Engine::KvmUserfault, kvm)?);
    let Ok(memory) = scratch(&[&[0; PAGE_BYTES], &userfault_code()]) else {
        ending.close(vm);
        return Ok(Userfault::UNTRIED);
    };
    Ok(userfault_over(vm, memory, None, ending))
}

/// Runs the guest of [`try_userfault`] in a guest_memfd, and then clears the slot's flag, as at the
/// end of demand paging. It works only if KVM's own accesses stop, too: nothing else could trap
/// them. `Refused` also if KVM has no guest_memfd that can be mapped.
pub(crate) fn try_guest_memfd(kvm: &Kvm, ending: Ending) -> Result<Trial, KvmError> {
    let vm = Arc::new(create_vm(Engine::KvmUserfault, kvm)?);
    let memory = match guest_memfd(&vm, 2 * PAGE_SIZE) {
        Ok(memory) => memory,
        Err(BackingError::Create { source, .. }) => {
            ending.close(vm);
            return Ok(source
                .raw_os_error()
                .map_or(Trial::Untried, |errno| Trial::Refused { errno }));
        }
        Err(_) => {
            ending.close(vm);
            return Ok(Trial::Untried);
        }
    };
    let filled = memory.map().map_err(io::Error::other).and_then(|mapping| {
        for (index, byte) in (0..).zip(userfault_code()) {
            // SAFETY: the byte lies in the second of the mapping's two pages, and nothing else
            // refers to it.
            unsafe { mapping.at(PAGE_SIZE + index).write_volatile(byte) };
        }
        Ok((Arc::new(mapping), Arc::new(MissingBitmap::new(2)?)))
    });
    let Ok(parts) = filled else {
        ending.close(vm);
        return Ok(Trial::Untried);
    };
    let Userfault { trial, own_accesses } =
        userfault_over(vm, parts, memory.file().cloned(), ending);
    // Otherwise nothing would keep KVM itself from missing pages.
    Ok(if trial.works() && own_accesses != Some(true) { Trial::Ignored } else { trial })
}

/// Returns the page with the code of the guest under [`try_userfault`].
fn userfault_code() -> [u8; PAGE_BYTES] {
    // mov si, 0xe000; cs outsb; hlt
    const CODE: [u8; 6] = [0xbe, 0x00, 0xe0, 0x2e, 0x6e, HLT];
    let mut code = [HLT; PAGE_BYTES];
    code[RESET..RESET + CODE.len()].copy_from_slice(&CODE);
    code
}

/// Runs the guest of [`try_userfault`] in this memory.
fn userfault_over(
    vm: Arc<VmFd>,
    (mapping, bitmap): (Arc<Mapping>, Arc<MissingBitmap>),
    guest_memfd: Option<Arc<File>>,
    ending: Ending,
) -> Userfault {
    let start = GuestAddress(DATA_PAGE);
    let memory = |bitmap| {
        let (mapping, guest_memfd) = (mapping.clone(), guest_memfd.clone());
        SlotMemory { mapping, bitmap, guest_memfd }
    };
    let missing = memory(Some(Bitmap::of_bitmap(&bitmap)));
    match Memslot::new(vm.clone(), 0, start, missing, KVM_MEM_USERFAULT) {
        Ok(slot) => {
            let (mut outcome, vcpu) = run::userfault(&vm, &bitmap);
            if guest_memfd.is_some()
                && let Err(SlotError::Flags { source, .. }) = slot.clear_flags()
            {
                outcome.trial = Trial::Refused { errno: source.errno() };
            }
            ending.close((vcpu, slot, vm));
            outcome
        }
        Err(SlotError::Create { source, .. }) => {
            let refused = Trial::Refused { errno: source.errno() };
            let (trial, slot) = if refused.is_lasting() {
                // Nothing else about this slot is wrong.
                (refused, None)
            } else {
                // The error concerns the flag only if KVM accepts the same slot without it.
                match Memslot::new(vm.clone(), 0, start, memory(None), 0) {
                    Ok(slot) => (refused, Some(slot)),
                    Err(_) => (Trial::Untried, None),
                }
            };
            ending.close((slot, vm));
            Userfault { trial, own_accesses: None }
        }
        Err(_) => {
            ending.close(vm);
            Userfault::UNTRIED
        }
    }
}

/// The outcome of trying memory attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Private {
    /// Whether a vCPU stops at a private page.
    pub(crate) trial: Trial,
    /// Whether KVM created a VM of the type that has private pages.
    pub(crate) vm: bool,
}

/// Runs a guest of one page, which is private at first.
pub(crate) fn try_attributes(kvm: &Kvm, ending: Ending) -> Private {
    let refused = |error: kvm_ioctls::Error| Trial::Refused { errno: error.errno() };
    let vm = match create_vm(Engine::KvmAttributes, kvm) {
        Ok(vm) => Arc::new(vm),
        Err(KvmError::CreateProtectedVm(error)) => {
            return Private { trial: refused(error), vm: false };
        }
        Err(_) => return Private { trial: Trial::Untried, vm: false },
    };
    let (trial, parts) = match scratch(&[&[HLT; PAGE_BYTES]]) {
        Err(_) => (Trial::Untried, None),
        Ok((mapping, _)) => match attributes::change(&vm, RESET_PAGE, PAGE_SIZE, PRIVATE) {
            Err(error) => (refused(error), None),
            Ok(()) => match Memslot::new(
                vm.clone(),
                0,
                GuestAddress(RESET_PAGE),
                SlotMemory::present(mapping),
                0,
            ) {
                Err(_) => (Trial::Untried, None),
                Ok(slot) => {
                    let (trial, vcpu) = run::attributes(&vm);
                    (trial, Some((vcpu, slot)))
                }
            },
        },
    };
    ending.close((parts, vm));
    Private { trial, vm: true }
}

/// Creates a scratch VM.
fn create_vm(engine: Engine, kvm: &Kvm) -> Result<VmFd, KvmError> {
    SCRATCH_VMS.fetch_add(1, Ordering::Relaxed);
    engine.create_vm(kvm)
}

/// The number of scratch VMs that were requested from KVM.
static SCRATCH_VMS: AtomicU64 = AtomicU64::new(0);

/// Returns the number of scratch VMs that this process has requested from KVM, to try engines on.
#[doc(hidden)]
pub fn scratch_vms() -> u64 {
    SCRATCH_VMS.load(Ordering::Relaxed)
}

/// Creates memory with these pages, and a bitmap in which all of them are missing.
fn scratch(pages: &[&[u8; PAGE_BYTES]]) -> io::Result<(Arc<Mapping>, Arc<MissingBitmap>)> {
    let count = pages.len() as u64;
    let memory =
        MemfdBacking::new(BackingKind::Shmem, count * PAGE_SIZE).map_err(io::Error::other)?;
    let mapping = memory.map().map_err(io::Error::other)?;
    let mut file = memory.file().map(|file| &**file).ok_or(io::ErrorKind::Unsupported)?;
    for page in pages {
        file.write_all(&page[..])?;
    }
    Ok((Arc::new(mapping), Arc::new(MissingBitmap::new(count)?)))
}

/// Runs a new vCPU. It starts at the reset vector, so it needs no other state. Each function also
/// returns the vCPU, which the caller closes.
#[cfg(target_arch = "x86_64")]
mod run {
    use demand_memory::{MissingBitmap, PageRange};
    use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

    use super::{DATA_PAGE, PAGE_SIZE, RESET_PAGE, Userfault, attributes};
    use crate::Trial;
    use crate::abi::{KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};

    #[derive(PartialEq)]
    enum Exit {
        Fault {
            flags: u64,
            gpa: u64,
        },
        Halt,
        Other,
        /// `KVM_RUN` fails, for a reason that may pass.
        Failed,
    }

    fn exit(vcpu: &mut VcpuFd) -> Exit {
        loop {
            return match vcpu.run() {
                Ok(VcpuExit::MemoryFault { flags, gpa, .. }) => Exit::Fault { flags, gpa },
                Ok(VcpuExit::Hlt) => Exit::Halt,
                Err(error) => match error.errno() {
                    libc::EINTR => continue,
                    // A vCPU that stops at memory without saying so.
                    libc::EFAULT => Exit::Other,
                    _ => Exit::Failed,
                },
                Ok(_) => Exit::Other,
            };
        }
    }

    /// Page 1 has the code, and page 0 is the one that the code makes KVM read.
    pub(super) fn userfault(vm: &VmFd, bitmap: &MissingBitmap) -> (Userfault, Option<VcpuFd>) {
        let outcome = |trial, own_accesses| Userfault { trial, own_accesses };
        let Ok(mut vcpu) = vm.create_vcpu(0) else { return (outcome(Trial::Untried, None), None) };
        let stop = |gpa| Exit::Fault { flags: KVM_MEMORY_EXIT_FLAG_USERFAULT, gpa };
        let found = match exit(&mut vcpu) {
            Exit::Failed => outcome(Trial::Untried, None),
            first if first == stop(RESET_PAGE) => {
                bitmap.claim_page(1);
                bitmap.publish(PageRange::new(1, 1));
                let own = match exit(&mut vcpu) {
                    Exit::Failed => None,
                    second => Some(second == stop(DATA_PAGE)),
                };
                outcome(Trial::Works, own)
            }
            _ => outcome(Trial::Ignored, None),
        };
        (found, Some(vcpu))
    }

    pub(super) fn attributes(vm: &VmFd) -> (Trial, Option<VcpuFd>) {
        let Ok(mut vcpu) = vm.create_vcpu(0) else { return (Trial::Untried, None) };
        let stopped = Exit::Fault { flags: KVM_MEMORY_EXIT_FLAG_PRIVATE, gpa: RESET_PAGE };
        let trial = match exit(&mut vcpu) {
            Exit::Failed => Trial::Untried,
            // Once the page is no longer private, the guest must resume.
            first if first == stopped => match attributes::change(vm, RESET_PAGE, PAGE_SIZE, 0) {
                Ok(()) if exit(&mut vcpu) == Exit::Halt => Trial::Works,
                _ => Trial::Ignored,
            },
            _ => Trial::Ignored,
        };
        (trial, Some(vcpu))
    }
}

/// Other architectures only test whether KVM accepts the slot.
#[cfg(not(target_arch = "x86_64"))]
mod run {
    use demand_memory::MissingBitmap;
    use kvm_ioctls::{VcpuFd, VmFd};

    use super::Userfault;
    use crate::Trial;

    pub(super) fn userfault(_vm: &VmFd, _: &MissingBitmap) -> (Userfault, Option<VcpuFd>) {
        (Userfault { trial: Trial::Works, own_accesses: Some(false) }, None)
    }

    pub(super) fn attributes(_vm: &VmFd) -> (Trial, Option<VcpuFd>) {
        (Trial::Untried, None)
    }
}
