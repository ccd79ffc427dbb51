// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A KVM memslot, and the memory that KVM uses through it.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use demand_memory::{
    BackingKind, BitmapReader, Mapping, MissingBitmap, PAGE_SIZE, Pager, VcpuTrap,
};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::Engine;
use crate::abi::{KVM_MEM_USERFAULT, set_userfault_bitmap};

/// Errors from creating or changing a memslot.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The slot would not begin on a page boundary.
    #[error(
        "cannot create memslot {number} at guest address {start:#x}: it is not a multiple of 4096 \
         bytes; choose an aligned address"
    )]
    Unaligned {
        /// Number of the slot.
        number: u32,
        /// Guest physical address that the caller asked for.
        start: u64,
    },
    /// Nothing keeps the guest, or KVM itself, from the mapping's missing pages.
    #[error(
        "cannot create memslot {number} under engine {engine}: accesses to missing pages of its \
         mapping are not trapped, {}, and they would read as zeros; arm the mapping before \
         creating the memslot",
        untrapped(*engine)
    )]
    Unarmed {
        /// Number of the slot.
        number: u32,
        /// Engine of the slot.
        engine: Engine,
    },
    /// Memory in whose mappings nothing can trap, under an engine or a KVM that needs such a trap.
    #[error(
        "cannot create memslot {number} over {kind} under engine {engine}: pages are missing, and \
         only a KVM that checks the missing bitmap in all of its accesses can keep the guest from \
         them; use {} on such a kernel, read all pages first, or use another kind of memory",
        Engine::KvmUserfault
    )]
    Untrappable {
        /// Number of the slot.
        number: u32,
        /// Kind of the memory.
        kind: BackingKind,
        /// Engine of the slot.
        engine: Engine,
    },
    /// The mapping was armed for another mechanism than the engine's.
    #[error(
        "cannot create memslot {number} under engine {engine}: its mapping was armed for \
         {armed:?} and not for {:?}; arm it for Engine::vcpu_trap",
        engine.vcpu_trap()
    )]
    ArmedOtherwise {
        /// Number of the slot.
        number: u32,
        /// Engine of the slot.
        engine: Engine,
        /// Mechanism for which the mapping was armed.
        armed: VcpuTrap,
    },
    /// The mapping was revoked, as by an earlier slot that was dropped.
    #[error(
        "cannot create memslot {number}: its mapping was revoked, and no access to it succeeds any \
         more; create the region again"
    )]
    Revoked {
        /// Number of the slot.
        number: u32,
    },
    /// KVM refused the slot.
    #[error(
        "cannot create memslot {number} of {size} bytes at guest address {start:#x}, flags \
         {flags:#x}: {source}; {}",
        create_advice(*source, *flags)
    )]
    Create {
        /// Number of the slot.
        number: u32,
        /// Guest physical address of its first byte.
        start: u64,
        /// Its length, in bytes.
        size: u64,
        /// Its `KVM_MEM_` flags.
        flags: u32,
        /// Error from KVM.
        source: kvm_ioctls::Error,
    },
    /// KVM refused to clear a slot's flags.
    #[error("cannot clear the flags of memslot {number}: {source}; they are unchanged")]
    Flags {
        /// Number of the slot.
        number: u32,
        /// Error from KVM.
        source: kvm_ioctls::Error,
    },
    /// The start relies on a kept outcome that a trial does not confirm.
    #[error(
        "cannot create memslot {number}: a kept probe says that KVM stops vCPUs at missing pages, \
         and a trial does not confirm it; start again, which probes anew"
    )]
    Unverified {
        /// Number of the slot.
        number: u32,
    },
    /// The memory attributes of the slot's pages could not be changed.
    #[error(
        "cannot change the memory attributes of memslot {number}, {size} bytes at guest address \
         {start:#x}: {source}; {}",
        attributes_advice(*source)
    )]
    Attributes {
        /// Number of the slot.
        number: u32,
        /// Guest physical address of the slot.
        start: u64,
        /// Length of the slot, in bytes.
        size: u64,
        /// Error from KVM.
        source: kvm_ioctls::Error,
    },
    /// Pages are missing, so KVM must keep reading the bitmap.
    #[error(
        "cannot disable paging on memslot {number}: {missing} pages are still missing; wait until \
         all are present"
    )]
    PagesMissing {
        /// Number of the slot.
        number: u32,
        /// Number of missing pages.
        missing: u64,
    },
}

fn untrapped(engine: Engine) -> &'static str {
    match engine.vcpu_trap() {
        VcpuTrap::Mapping | VcpuTrap::Markers => "neither the guest's nor KVM's own",
        VcpuTrap::Hypervisor => "when KVM itself makes them",
    }
}

fn create_advice(error: kvm_ioctls::Error, flags: u32) -> &'static str {
    match error.errno() {
        libc::EEXIST => "it overlaps another memslot; choose another address",
        libc::EINVAL if flags & KVM_MEM_GUEST_MEMFD != 0 && flags & KVM_MEM_USERFAULT != 0 => {
            "this kernel may lack KVM Userfault for guest_memfd, or the file may be another VM's; \
             use another kind of memory, or read all pages first"
        }
        libc::EINVAL if flags & KVM_MEM_USERFAULT != 0 => {
            "this kernel may lack KVM Userfault; use another engine"
        }
        libc::EINVAL => "check that the number is unused and below KVM_CAP_NR_MEMSLOTS",
        libc::ENOMEM => "free memory, or use less guest memory",
        libc::ENOTTY => "this kernel is older than 6.8; use another engine",
        _ => "check the kernel log",
    }
}

fn attributes_advice(error: kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOMEM => "free memory; the attributes are unchanged",
        _ => "create the VM with Engine::create_vm",
    }
}

/// The missing bitmap that KVM reads for a slot, and the owner that keeps it in memory.
#[derive(Clone)]
pub(crate) struct Bitmap {
    address: u64,
    words: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Bitmap {
    pub(crate) fn of_pager(pager: &Arc<Pager>) -> Self {
        Self::of(pager.bitmap(), pager.clone())
    }

    pub(crate) fn of_bitmap(bitmap: &Arc<MissingBitmap>) -> Self {
        Self::of(bitmap, bitmap.clone())
    }

    fn of(bitmap: &BitmapReader, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let words = bitmap.words();
        Bitmap { address: words.as_ptr() as u64, words: words.len(), _owner: owner }
    }
}

/// The memory that KVM uses while a slot exists.
pub(crate) struct SlotMemory {
    pub(crate) mapping: Arc<Mapping>,
    /// The missing bitmap, which KVM reads while the slot has [`KVM_MEM_USERFAULT`].
    pub(crate) bitmap: Option<Bitmap>,
    /// The guest_memfd that the mapping is of, if it is of one.
    pub(crate) guest_memfd: Option<Arc<File>>,
}

impl SlotMemory {
    /// Returns memory of which no page is missing, and which is no guest_memfd.
    pub(crate) fn present(mapping: Arc<Mapping>) -> Self {
        SlotMemory { mapping, bitmap: None, guest_memfd: None }
    }

    /// Returns the flags of a slot over this memory that has `flags` as well.
    fn flags(&self, flags: u32) -> u32 {
        flags | if self.guest_memfd.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 }
    }
}

/// A memslot, deleted when it is dropped.
///
/// KVM reads and writes the mapping, and reads the bitmap, for as long as the slot exists. That may
/// be longer than the VM's descriptor is open, because each vCPU's descriptor keeps the VM. So the
/// slot owns both, and releases them only once KVM has reported that the slot is deleted; KVM waits
/// for the slot's last users before it does. If KVM cannot delete the slot they are kept for ever.
/// Leaking a slot leaks them too.
pub(crate) struct Memslot {
    vm: Arc<VmFd>,
    number: u32,
    start: GuestAddress,
    used: ManuallyDrop<SlotMemory>,
}

impl Memslot {
    /// Creates a slot. With [`KVM_MEM_USERFAULT`] in `flags` KVM reads the memory's bitmap, which
    /// must be `Some`.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        used: SlotMemory,
        flags: u32,
    ) -> Result<Self, SlotError> {
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(SlotError::Unaligned { number, start: start.0 });
        }
        if let Some(bitmap) = &used.bitmap {
            let pages = used.mapping.len().div_ceil(PAGE_SIZE);
            assert!(
                bitmap.words as u64 >= pages.div_ceil(64),
                "a bitmap needs a bit for each page of the memslot"
            );
        }
        let size = used.mapping.len();
        set(&vm, number, start, &used, flags, size).map_err(|source| SlotError::Create {
            number,
            start: start.0,
            size,
            flags: used.flags(flags),
            source,
        })?;
        Ok(Memslot { vm, number, start, used: ManuallyDrop::new(used) })
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn start(&self) -> GuestAddress {
        self.start
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.used.mapping
    }

    /// Clears the slot's flags that can change: KVM stops reading the bitmap.
    pub(crate) fn clear_flags(&self) -> Result<(), SlotError> {
        let number = self.number;
        set(&self.vm, number, self.start, &self.used, 0, self.used.mapping.len())
            .map_err(|source| SlotError::Flags { number, source })
    }
}

/// Creates, changes or (with a `memory_size` of 0) deletes a slot.
fn set(
    vm: &VmFd,
    slot: u32,
    start: GuestAddress,
    used: &SlotMemory,
    flags: u32,
    memory_size: u64,
) -> Result<(), kvm_ioctls::Error> {
    let guest_phys_addr = start.0;
    let userspace_addr = used.mapping.address().as_ptr() as u64;
    let flags = used.flags(flags);
    if flags & (KVM_MEM_USERFAULT | KVM_MEM_GUEST_MEMFD) == 0 {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            userspace_addr,
        };
        // SAFETY: the mapping is `memory_size` bytes long, or the slot is deleted. It stays mapped
        // until KVM has reported that the slot is deleted: see `Memslot`. This process has no Rust
        // reference to its bytes, so the guest may write them. KVM refuses slots that overlap.
        return unsafe { vm.set_user_memory_region(region) };
    }
    let mut region = kvm_userspace_memory_region2 {
        slot,
        flags,
        guest_phys_addr,
        memory_size,
        userspace_addr,
        ..Default::default()
    };
    if flags & KVM_MEM_USERFAULT != 0 {
        let bitmap = used.bitmap.as_ref().expect("KVM Userfault needs a bitmap");
        set_userfault_bitmap(&mut region, bitmap.address);
    }
    if let Some(file) = &used.guest_memfd {
        region.guest_memfd = file.as_raw_fd().cast_unsigned();
    }
    // SAFETY: as above for the mapping. A guest_memfd has the same bytes, and KVM knows its size.
    // The bitmap has a bit for each page, which `Memslot::new` has checked. KVM only reads it, and
    // its owner is kept until the slot is deleted.
    unsafe { vm.set_user_memory_region2(region) }
}

impl Drop for Memslot {
    fn drop(&mut self) {
        // KVM waits for pages on vCPU threads and on kernel threads. No kick or signal reaches some
        // of these waits, and closing the VM waits for them. Revoking the mapping ends them with an
        // error, and no access reads zeros afterwards.
        let revoked = self.used.mapping.revoke();
        if let Err(error) = &revoked {
            log::error!("cannot make the memory of memslot {} inaccessible: {error}", self.number);
        }
        let deleted = set(&self.vm, self.number, self.start, &self.used, 0, 0);
        // Ends the remaining waits if the mapping could not be revoked. If the slot still exists as
        // well, the trap stays, because without it KVM would read zeros.
        if revoked.is_ok() || deleted.is_ok() {
            self.used.mapping.remove_guard();
        }
        match deleted {
            // SAFETY: the slot is deleted, so KVM no longer uses the memory that it held. `used` is
            // not accessed again.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.used) },
            Err(error) => log::error!(
                "cannot delete memslot {}: {error}; its {} bytes stay mapped",
                self.number,
                self.used.mapping.len()
            ),
        }
    }
}

impl fmt::Debug for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memslot")
            .field("number", &self.number)
            .field("start", &self.start)
            .field("mapping", &self.used.mapping)
            .finish_non_exhaustive()
    }
}
