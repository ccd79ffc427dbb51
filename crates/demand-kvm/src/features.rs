// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The features of this host's KVM.

use kvm_ioctls::{Cap, Kvm};
use libc::c_ulong;
use serde::Serialize;

use crate::abi::KVM_CAP_GUEST_MEMFD_FLAGS;
use crate::scratch::{self, Ending, Userfault};
use crate::{Engine, EngineChoice, KvmError, Trial, found};

/// The features of this host's KVM, queried or tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvmFeatures {
    /// The answer of `KVM_GET_API_VERSION`: 12.
    pub api_version: i32,
    /// Whether `KVM_SET_USER_MEMORY_REGION2` exists (`KVM_CAP_USER_MEMORY2`, Linux 6.8).
    pub user_memory2: bool,
    /// Whether memory faults are exits with an address (`KVM_CAP_MEMORY_FAULT_INFO`, Linux 6.8).
    pub memory_fault_info: bool,
    /// The outcome of trying KVM Userfault. Its capability number is not queried: it has changed
    /// between versions of the series, and some of those numbers have other meanings in other
    /// kernels.
    pub userfault: Trial,
    /// The outcome of trying memory attributes as a trap.
    pub attributes: Trial,
    /// Whether KVM's own accesses respect the KVM Userfault bitmap. Tried with a string instruction
    /// that KVM emulates, which must leave `KVM_RUN` at a missing page. Kernels that do this also
    /// respect the bitmap in their prefetch, when they restore huge pages, and for nested guests on
    /// SVM.
    pub own_accesses: bool,
    /// The memory attributes that a VM can have (`KVM_CAP_MEMORY_ATTRIBUTES`); bit 3 is "private".
    pub memory_attributes: u64,
    /// Whether KVM created a VM of type `KVM_X86_SW_PROTECTED_VM` when the attributes were tried.
    pub sw_protected_vm: bool,
    /// Whether `KVM_CREATE_GUEST_MEMFD` exists (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// The flags of `KVM_CREATE_GUEST_MEMFD` (`KVM_CAP_GUEST_MEMFD_FLAGS`): bit 0 `MMAP`, bit 1
    /// `INIT_SHARED`.
    pub guest_memfd_flags: u32,
    /// The outcome of trying KVM Userfault on memory in a guest_memfd, KVM's own accesses and the
    /// end included. [`probe`](crate::probe) tries it, and a start does not: KVM then refuses the
    /// memslot.
    pub guest_memfd_userfault: Trial,
}

/// The trials that a probe makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    /// Whether KVM Userfault is tried.
    pub(crate) userfault: bool,
    /// Whether memory attributes are tried.
    pub(crate) attributes: bool,
    /// Whether KVM Userfault is tried on a guest_memfd.
    pub(crate) guest_memfd: bool,
}

impl Scope {
    /// Everything.
    pub(crate) const ALL: Self = Scope { userfault: true, attributes: true, guest_memfd: true };

    /// Nothing.
    pub(crate) const NONE: Self = Scope { userfault: false, attributes: false, guest_memfd: false };

    /// Returns the trials on which [`resolve`](crate::resolve) depends for this choice.
    pub(crate) fn of(choice: EngineChoice) -> Self {
        let scope = |userfault, attributes| Scope { userfault, attributes, ..Scope::NONE };
        match choice {
            EngineChoice::Auto | EngineChoice::Only(Engine::KvmUserfault) => scope(true, false),
            EngineChoice::Only(Engine::KvmAttributes) => scope(false, true),
            // To KVM its slots are ordinary ones.
            EngineChoice::Only(Engine::Uffd | Engine::UffdPoison) => Scope::NONE,
        }
    }
}

/// The outcomes of the trials. Those that are [lasting](Trial::is_lasting) depend on the running
/// kernel only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trials {
    pub(crate) userfault: Userfault,
    pub(crate) attributes: Trial,
    /// Whether KVM created a VM that has private pages.
    pub(crate) protected_vm: bool,
    /// Not kept in a file, because no start depends on it.
    pub(crate) guest_memfd: Trial,
}

impl Trials {
    /// Makes those trials of `scope` whose outcome is not known.
    pub(crate) fn complete(
        &mut self,
        kvm: &Kvm,
        scope: Scope,
        ending: Ending,
    ) -> Result<(), KvmError> {
        if scope.userfault && !self.userfault.is_known() {
            self.userfault = found::try_userfault(kvm, ending)?;
        }
        if scope.attributes && self.attributes == Trial::Untried {
            let scratch::Private { trial, vm } = scratch::try_attributes(kvm, ending);
            (self.attributes, self.protected_vm) = (trial, vm);
        }
        if scope.guest_memfd && self.guest_memfd == Trial::Untried {
            self.guest_memfd = scratch::try_guest_memfd(kvm, ending)?;
        }
        Ok(())
    }
}

impl KvmFeatures {
    /// Queries KVM, and adds the outcomes of the trials of features that no capability describes.
    pub(crate) fn of(kvm: &Kvm, trials: Trials) -> Self {
        // 0 or less: the kernel does not know the capability.
        let value =
            |cap: u32| u32::try_from(kvm.check_extension_raw(c_ulong::from(cap))).unwrap_or(0);
        KvmFeatures {
            api_version: kvm.get_api_version(),
            user_memory2: value(Cap::UserMemory2 as u32) != 0,
            memory_fault_info: value(kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO) != 0,
            userfault: trials.userfault.trial,
            attributes: trials.attributes,
            own_accesses: trials.userfault.own_accesses == Some(true),
            memory_attributes: u64::from(value(Cap::MemoryAttributes as u32)),
            sw_protected_vm: trials.protected_vm,
            guest_memfd: value(Cap::GuestMemfd as u32) != 0,
            guest_memfd_flags: value(KVM_CAP_GUEST_MEMFD_FLAGS),
            guest_memfd_userfault: trials.guest_memfd,
        }
    }

    /// Returns the outcome of trying an engine.
    pub(crate) fn trial(&self, engine: Engine) -> Trial {
        match engine {
            Engine::KvmUserfault => self.userfault,
            Engine::KvmAttributes => self.attributes,
            // To KVM this is an ordinary slot.
            Engine::Uffd => Trial::Works,
            // So is this, and what KVM makes of its markers does not depend on its features.
            Engine::UffdPoison => Trial::Works,
        }
    }
}
