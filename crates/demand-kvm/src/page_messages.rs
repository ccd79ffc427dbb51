// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages of KVM about pages for which it waits itself.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::abi::{KVM_SET_USERFAULT_FD, kvm_userfault_fd};

/// Errors from registering a userfaultfd with a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageMessagesError {
    /// This kernel's KVM never waits for pages: some of its own accesses fail at missing ones.
    #[error("KVM does not wait for pages: this kernel has no KVM_SET_USERFAULT_FD")]
    Unsupported,
    /// KVM refused the descriptor.
    #[error("cannot register a userfaultfd with the VM: {0}; pass one that is ready for use")]
    Refused(#[source] io::Error),
}

/// Makes KVM wait for missing pages where one of its own accesses can neither leave `KVM_RUN` nor
/// fail without harm to the guest, and queue a message on a userfaultfd for each such page (a
/// kernel patch, for slots of [`Engine::KvmUserfault`](crate::Engine::KvmUserfault)).
///
/// Threads that read the userfaultfd must provide the pages for as long as this exists, and must
/// not be threads of vCPUs. Dropping it ends the waits: the accesses then fail, as do later ones.
/// Drop it before the memslots are deleted, and once no page is missing.
///
/// A VM has one at a time: a later one replaces it.
#[must_use = "KVM stops waiting when this is dropped"]
pub struct PageMessages {
    vm: Arc<VmFd>,
}

impl PageMessages {
    /// Registers a userfaultfd. KVM does not keep it open: when its last descriptor is closed, KVM
    /// waits no longer.
    ///
    /// # Errors
    ///
    /// [`PageMessagesError`].
    pub fn register(vm: &Arc<VmFd>, uffd: BorrowedFd<'_>) -> Result<Self, PageMessagesError> {
        match set(vm, uffd.as_raw_fd()) {
            Ok(()) => Ok(PageMessages { vm: vm.clone() }),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                Err(PageMessagesError::Unsupported)
            }
            Err(error) => Err(PageMessagesError::Refused(error)),
        }
    }
}

fn set(vm: &VmFd, fd: i32) -> io::Result<()> {
    let request = kvm_userfault_fd { fd, flags: 0 };
    // SAFETY: the request reads this structure only.
    match unsafe { ioctl_with_ref(vm, KVM_SET_USERFAULT_FD(), &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for PageMessages {
    fn drop(&mut self) {
        // KVM refuses it for a VM that has ended, and in a child process, where it must do nothing.
        if let Err(error) = set(&self.vm, -1) {
            log::debug!("cannot end KVM's waits for pages: {error}");
        }
    }
}

impl fmt::Debug for PageMessages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageMessages").finish_non_exhaustive()
    }
}
