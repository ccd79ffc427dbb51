// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engines: the ways to trap a guest's access to a missing page.

use std::fmt;
use std::str::FromStr;

use demand_memory::VcpuTrap;
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};

use crate::{KvmError, Probe, Trial};

/// A way to trap a guest's access to a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Engine {
    /// KVM reads the missing bitmap and returns from `KVM_RUN` on the vCPU's thread, 4096 bytes at
    /// a time on any backing. Needs a kernel with the KVM Userfault series.
    KvmUserfault,
    /// A userfaultfd on the guest's mapping, served by another thread, one unit of the backing at a
    /// time. Works with any kernel; to KVM the memslot is an ordinary one.
    Uffd,
    /// Missing pages are private pages without a guest_memfd: KVM returns from `KVM_RUN` on the
    /// vCPU's thread, 4096 bytes at a time on any backing. Experimental, and chosen only by name.
    /// Needs Linux 6.8 with `CONFIG_KVM_SW_PROTECTED_VM`, nested paging in the processor, and a VM
    /// from [`create_vm`](Engine::create_vm).
    ///
    /// Its weaknesses:
    ///
    /// - The kernel documents this type of VM as meant for development and testing.
    /// - Setting up costs KVM a step for each page, and each page that a vCPU reaches costs an
    ///   ioctl that stops all other vCPUs.
    /// - Accesses by KVM itself are not trapped. On shared memory a userfaultfd traps them instead;
    ///   on huge pages it cannot.
    KvmAttributes,
}

impl Engine {
    /// All engines, in order of preference.
    pub const ALL: [Engine; 3] = [Engine::KvmUserfault, Engine::Uffd, Engine::KvmAttributes];

    /// The engines' names and descriptions, for the help text of an option.
    pub const HELP: &str = "auto: the best that the host supports; kvm-userfault: KVM reads \
                            the missing bitmap (a kernel with the KVM Userfault series); uffd: \
                            userfaultfd under the guest (any kernel); kvm-attributes: memory \
                            attributes (experimental, never chosen by auto: set-up takes a step \
                            per page, and KVM's own accesses to huge pages are not trapped)";

    /// Returns the engine's name on command lines and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Engine::KvmUserfault => "kvm-userfault",
            Engine::Uffd => "uffd",
            Engine::KvmAttributes => "kvm-attributes",
        }
    }

    /// Returns the feature that KVM must accept for the engine to work.
    pub(crate) const fn needs(self) -> &'static str {
        match self {
            Engine::KvmUserfault => "a memslot with KVM_MEM_USERFAULT",
            Engine::Uffd => "a memslot",
            Engine::KvmAttributes => "private pages in a VM of type KVM_X86_SW_PROTECTED_VM",
        }
    }

    /// Returns the mechanism that keeps vCPUs from missing pages: KVM, or the guest's mapping,
    /// which must be armed to match before the slot is created.
    pub const fn vcpu_trap(self) -> VcpuTrap {
        match self {
            Engine::KvmUserfault | Engine::KvmAttributes => VcpuTrap::Hypervisor,
            Engine::Uffd => VcpuTrap::Mapping,
        }
    }

    /// Creates a virtual machine whose slots this engine can trap: an ordinary one, except with
    /// [`Engine::KvmAttributes`].
    ///
    /// # Errors
    ///
    /// [`KvmError::CreateVm`] and [`KvmError::CreateProtectedVm`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_kvm::{Engine, open_kvm};
    ///
    /// let Ok(kvm) = open_kvm() else { return };
    /// let _vm = Engine::Uffd.create_vm(&kvm).unwrap();
    /// ```
    pub fn create_vm(self, kvm: &Kvm) -> Result<VmFd, KvmError> {
        match self {
            Engine::KvmUserfault | Engine::Uffd => kvm.create_vm().map_err(KvmError::CreateVm),
            Engine::KvmAttributes => create_protected_vm(kvm).map_err(KvmError::CreateProtectedVm),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn create_protected_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    kvm.create_vm_with_type(u64::from(kvm_bindings::KVM_X86_SW_PROTECTED_VM))
}

#[cfg(not(target_arch = "x86_64"))]
fn create_protected_vm(_: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    Err(kvm_ioctls::Error::new(libc::EINVAL))
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The engine that the user asked for.
///
/// # Examples
///
/// ```
/// use demand_kvm::{Engine, EngineChoice};
///
/// assert_eq!("auto".parse(), Ok(EngineChoice::Auto));
/// assert_eq!("uffd".parse(), Ok(EngineChoice::Only(Engine::Uffd)));
/// let error = "vmexit".parse::<EngineChoice>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "unknown engine 'vmexit'; choose one of auto, kvm-userfault, uffd, kvm-attributes"
/// );
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineChoice {
    /// The best engine that the host has.
    #[default]
    Auto,
    /// This engine, or an error.
    Only(Engine),
}

impl EngineChoice {
    const AUTO: &'static str = "auto";

    /// Returns the choice's name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            EngineChoice::Auto => EngineChoice::AUTO,
            EngineChoice::Only(engine) => engine.name(),
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Error for an engine name that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown engine '{0}'; choose one of {names}", names = names())]
pub struct UnknownEngine(pub String);

fn names() -> String {
    let engines = Engine::ALL.map(Engine::name).join(", ");
    format!("{}, {engines}", EngineChoice::AUTO)
}

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        if name == EngineChoice::AUTO {
            return Ok(EngineChoice::Auto);
        }
        let engine = Engine::ALL.into_iter().find(|engine| engine.name() == name);
        engine.map(EngineChoice::Only).ok_or_else(|| UnknownEngine(name.to_owned()))
    }
}

/// Errors from choosing an engine: this host cannot run the one that was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The host has no usable KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host lacks the engine that the user named.
    #[error(
        "cannot use engine {engine}: {}; use engine uffd or auto, or {}",
        .trial.describe(*.engine),
        remedy(*.engine)
    )]
    NotThere {
        /// The engine.
        engine: Engine,
        /// The outcome of trying it.
        trial: Trial,
    },
}

fn remedy(engine: Engine) -> &'static str {
    match engine {
        Engine::KvmAttributes => "boot a kernel with CONFIG_KVM_SW_PROTECTED_VM and nested paging",
        Engine::KvmUserfault | Engine::Uffd => "boot a kernel with the KVM Userfault series",
    }
}

/// Chooses the engine: the one that the user named, or with [`EngineChoice::Auto`] the best that
/// the host has, which is never [`Engine::KvmAttributes`]. KVM always supports [`Engine::Uffd`];
/// whether this user may open a userfaultfd is checked only when one is opened.
///
/// # Errors
///
/// [`EngineError`] if the host has no usable KVM or lacks the engine that was asked for.
///
/// # Examples
///
/// ```
/// use demand_kvm::{Engine, EngineChoice, probe, resolve};
///
/// let probe = probe();
/// match resolve(EngineChoice::Auto, &probe) {
///     Ok(engine) => println!("pages are caught by {engine}"),
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
pub fn resolve(choice: EngineChoice, probe: &Probe) -> Result<Engine, EngineError> {
    let features = probe.kvm.as_ref().map_err(Clone::clone)?;
    match choice {
        EngineChoice::Only(engine) => match features.trial(engine) {
            Trial::Works => Ok(engine),
            trial => Err(EngineError::NotThere { engine, trial }),
        },
        EngineChoice::Auto if features.userfault.works() => Ok(Engine::KvmUserfault),
        EngineChoice::Auto => Ok(Engine::Uffd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvmFeatures, Virtualization};

    fn host(userfault: Trial, attributes: Trial) -> Probe {
        let kvm = Ok(KvmFeatures { userfault, attributes, ..KvmFeatures::default() });
        Probe { virtualization: Virtualization::Svm, kvm }
    }

    const REFUSED: Trial = Trial::Refused { errno: libc::EINVAL };

    #[test]
    fn names_are_read_back() {
        let choices = Engine::ALL.map(EngineChoice::Only);
        for choice in choices.into_iter().chain([EngineChoice::Auto]) {
            assert_eq!(choice.to_string().parse(), Ok(choice));
            assert!(Engine::HELP.contains(&format!("{choice}: ")), "{choice}");
        }
        assert!("attributes".parse::<EngineChoice>().is_err());
    }

    #[test]
    fn auto_takes_the_best_available_engine() {
        for (userfault, best) in [
            (Trial::Works, Engine::KvmUserfault),
            (REFUSED, Engine::Uffd),
            (Trial::Ignored, Engine::Uffd),
        ] {
            // Never the experimental engine, whether the host has it or not.
            for attributes in [Trial::Works, REFUSED] {
                assert_eq!(resolve(EngineChoice::Auto, &host(userfault, attributes)), Ok(best));
            }
        }
    }

    #[test]
    fn named_engine_is_never_replaced() {
        let only = |engine| EngineChoice::Only(engine);
        let all = host(Trial::Works, Trial::Works);
        for engine in Engine::ALL {
            assert_eq!(resolve(only(engine), &all), Ok(engine));
        }
        for (engine, needs) in [
            (Engine::KvmUserfault, "KVM Userfault series"),
            (Engine::KvmAttributes, "CONFIG_KVM_SW_PROTECTED_VM"),
        ] {
            let error = resolve(only(engine), &host(REFUSED, REFUSED)).unwrap_err();
            assert_eq!(error, EngineError::NotThere { engine, trial: REFUSED });
            let text = error.to_string();
            for part in ["Invalid argument", "use engine uffd", needs, engine.name()] {
                assert!(text.contains(part) && !text.contains('\n'), "{text}");
            }
        }
    }

    #[test]
    fn without_kvm_there_is_no_engine() {
        let error = KvmError::NotThere(kvm_ioctls::Error::new(libc::ENOENT));
        let probe = Probe { virtualization: Virtualization::Svm, kvm: Err(error.clone()) };
        assert_eq!(resolve(EngineChoice::Auto, &probe), Err(EngineError::Kvm(error)));
    }
}
