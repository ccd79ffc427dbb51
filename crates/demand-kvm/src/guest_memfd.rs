// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory in a guest_memfd: a file that belongs to a VM, and that KVM uses without a mapping.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use demand_memory::{BackingError, BackingKind, VmFileBacking};
use kvm_bindings::kvm_create_guest_memfd;
use kvm_ioctls::VmFd;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::abi::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};

/// The limits of memory in a guest_memfd on every kernel so far: sentences, without full stops.
pub const GUEST_MEMFD_LIMITS: [&str; 3] = [
    "guest-memfd consists of pages of 4K: the kernel has no huge ones for it",
    "no userfaultfd traps accesses to guest-memfd: only engine kvm-userfault runs a guest while \
     pages are missing, and back-ends get the memory once all of it is present",
    "KVM logs no dirty pages of guest-memfd: changed pages cannot be told from others",
];

/// Creates `size` bytes of memory in a guest_memfd of this VM, which can be mapped and all of which
/// is shared with the guest. Only memslots of the same VM can have it. The file keeps the VM.
///
/// Only [`Engine::KvmUserfault`](crate::Engine::KvmUserfault) traps the guest's accesses to its
/// missing pages, on kernels with
/// [`KvmFeatures::guest_memfd_userfault`](crate::KvmFeatures::guest_memfd_userfault). See
/// [`GUEST_MEMFD_LIMITS`] for the rest.
///
/// # Errors
///
/// [`BackingError::Size`]; [`BackingError::Create`] with KVM's error: before Linux 6.18 it knows no
/// such file.
///
/// # Examples
///
/// ```
/// use demand_kvm::{guest_memfd, open_kvm};
/// use demand_memory::Backing;
///
/// let Ok(kvm) = open_kvm() else { return };
/// let vm = kvm.create_vm().unwrap();
/// match guest_memfd(&vm, 1 << 20) {
///     Ok(memory) => assert_eq!(memory.size(), 1 << 20),
///     Err(error) => println!("{error}"),
/// }
/// ```
pub fn guest_memfd(vm: &VmFd, size: u64) -> Result<VmFileBacking, BackingError> {
    let kind = BackingKind::GuestMemfd;
    let refused = |source| BackingError::Create { size, kind, source };
    kind.expect_size(size)?;
    let flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    let request = kvm_create_guest_memfd { size, flags, ..Default::default() };
    let fd = vm.create_guest_memfd(request).map_err(|error| refused(error.into()))?;
    // SAFETY: KVM has just returned this descriptor, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    // KVM creates it without.
    fcntl_setfd(&file, FdFlags::CLOEXEC).map_err(|error| refused(io::Error::from(error)))?;
    VmFileBacking::new(file, size)
}
