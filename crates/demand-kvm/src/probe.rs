// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this host's KVM can do.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use demand_memory::{Mapping, PAGE_SIZE, Words};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VmFd};
use libc::c_ulong;
use serde::{Serialize, Serializer};
use vm_memory::GuestAddress;

use crate::abi::{KVM_CAP_GUEST_MEMFD_FLAGS, KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use crate::memslot::{Bitmap, Memslot};
use crate::{Engine, KvmError, SlotError, open_kvm};

/// What runs guests on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Virtualization {
    /// Intel's VMX.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// Neither: if there is a KVM, it emulates the guest's instructions or is paravirtual, which
    /// is slow and may not run an unmodified guest.
    Emulated,
    /// Not told: /proc/cpuinfo cannot be read, or this is not x86.
    Unknown,
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Virtualization::Vmx => "Intel VMX",
            Virtualization::Svm => "AMD SVM",
            Virtualization::Emulated => "an emulating KVM: the processor has neither vmx nor svm",
            Virtualization::Unknown => "unknown",
        })
    }
}

/// Whether KVM Userfault is there: what came of trying it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Userfault {
    /// A vCPU that touched a page whose bit was set left `KVM_RUN` as it should.
    Works,
    /// KVM refused a memslot with the flag; `EINVAL` (22) where it does not know it.
    Refused {
        /// What KVM said.
        errno: i32,
    },
    /// KVM took the flag, but the guest was not stopped at a missing page: here the bit means
    /// something else.
    Ignored,
    /// It could not be tried.
    #[default]
    Untried,
}

impl Userfault {
    /// Whether [`Engine::KvmUserfault`] can be used.
    pub fn works(self) -> bool {
        self == Userfault::Works
    }
}

impl fmt::Display for Userfault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Userfault::Works => f.write_str("KVM stops a vCPU at a missing page"),
            Userfault::Refused { errno } => write!(
                f,
                "KVM refuses a memslot with KVM_MEM_USERFAULT: {}",
                io::Error::from_raw_os_error(*errno)
            ),
            Userfault::Ignored => f.write_str(
                "KVM takes a memslot with the flag of KVM_MEM_USERFAULT, but does not stop a \
                 vCPU at a missing page",
            ),
            Userfault::Untried => f.write_str("KVM_MEM_USERFAULT could not be tried"),
        }
    }
}

/// What KVM has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvmFeatures {
    /// What `KVM_GET_API_VERSION` says: 12.
    pub api_version: i32,
    /// `KVM_SET_USER_MEMORY_REGION2` is there (`KVM_CAP_USER_MEMORY2`, Linux 6.8).
    pub user_memory2: bool,
    /// Memory faults are exits with an address (`KVM_CAP_MEMORY_FAULT_INFO`, Linux 6.8).
    pub memory_fault_info: bool,
    /// KVM Userfault, by trying it: its capability has had several numbers, and some of them
    /// mean other things in other kernels.
    pub userfault: Userfault,
    /// Memory attributes that a VM can have (`KVM_CAP_MEMORY_ATTRIBUTES`); bit 3 is "private".
    pub memory_attributes: u64,
    /// A VM of type `KVM_X86_SW_PROTECTED_VM` could be made, by trying it.
    pub sw_protected_vm: bool,
    /// `KVM_CREATE_GUEST_MEMFD` is there (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// Flags that it takes (`KVM_CAP_GUEST_MEMFD_FLAGS`): bit 0 `MMAP`, bit 1 `INIT_SHARED`.
    pub guest_memfd_flags: u32,
}

/// One engine, whether this host has it, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EngineReport {
    /// The engine.
    pub engine: Engine,
    /// Whether it can be used, as far as KVM is concerned.
    pub usable: bool,
    /// Why, or why not.
    pub why: String,
}

/// What this host can do. Serialized, it is a flat object: `virtualization`, `usable`, `error`
/// (if there is no usable KVM), the fields of [`KvmFeatures`] (if there is), and `engines`.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// What runs guests.
    pub virtualization: Virtualization,
    /// What KVM has, or why it cannot be used.
    pub kvm: Result<KvmFeatures, KvmError>,
}

impl Probe {
    /// All engines, the best first.
    pub fn engines(&self) -> Vec<EngineReport> {
        let report = |engine| {
            let (usable, why) = match (&self.kvm, engine) {
                (Err(error), _) => (false, error.to_string()),
                (Ok(kvm), Engine::KvmUserfault) => {
                    (kvm.userfault.works(), kvm.userfault.to_string())
                }
                (Ok(_), Engine::Uffd) => (true, "to KVM it is memory like any other".to_owned()),
            };
            EngineReport { engine, usable, why }
        };
        Engine::ALL.map(report).into()
    }
}

impl Serialize for Probe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            virtualization: Virtualization,
            usable: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<String>,
            #[serde(flatten)]
            features: Option<&'a KvmFeatures>,
            engines: Vec<EngineReport>,
        }
        let Probe { virtualization, kvm } = self;
        let flat = Flat {
            virtualization: *virtualization,
            usable: kvm.is_ok(),
            error: kvm.as_ref().err().map(ToString::to_string),
            features: kvm.as_ref().ok(),
            engines: self.engines(),
        };
        flat.serialize(serializer)
    }
}

/// Finds out what this host can do. Engines are tried on a scratch VM, which takes some
/// milliseconds.
///
/// # Examples
///
/// ```
/// for report in demand_kvm::probe().engines() {
///     println!("{}: {}", report.engine, report.why);
/// }
/// ```
pub fn probe() -> Probe {
    Probe { virtualization: virtualization(), kvm: open_kvm().and_then(|kvm| features(&kvm)) }
}

fn virtualization() -> Virtualization {
    if !cfg!(target_arch = "x86_64") {
        return Virtualization::Unknown;
    }
    fs::read_to_string("/proc/cpuinfo")
        .map_or(Virtualization::Unknown, |cpuinfo| virtualization_of(&cpuinfo))
}

fn virtualization_of(cpuinfo: &str) -> Virtualization {
    let Some(flags) = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")) else {
        return Virtualization::Unknown;
    };
    let has = |name| flags.split_whitespace().any(|flag| flag == name);
    match (has("vmx"), has("svm")) {
        (true, _) => Virtualization::Vmx,
        (_, true) => Virtualization::Svm,
        _ => Virtualization::Emulated,
    }
}

fn features(kvm: &Kvm) -> Result<KvmFeatures, KvmError> {
    let vm = kvm.create_vm().map_err(KvmError::CreateVm)?;
    // 0 and below: the kernel does not know the capability.
    let value = |cap: u32| u32::try_from(kvm.check_extension_raw(c_ulong::from(cap))).unwrap_or(0);
    Ok(KvmFeatures {
        api_version: kvm.get_api_version(),
        user_memory2: value(Cap::UserMemory2 as u32) != 0,
        memory_fault_info: value(kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO) != 0,
        userfault: try_userfault(vm),
        memory_attributes: u64::from(value(Cap::MemoryAttributes as u32)),
        sw_protected_vm: sw_protected_vm(kvm),
        guest_memfd: value(Cap::GuestMemfd as u32) != 0,
        guest_memfd_flags: value(KVM_CAP_GUEST_MEMFD_FLAGS),
    })
}

#[cfg(target_arch = "x86_64")]
fn sw_protected_vm(kvm: &Kvm) -> bool {
    kvm.create_vm_with_type(u64::from(kvm_bindings::KVM_X86_SW_PROTECTED_VM)).is_ok()
}

#[cfg(not(target_arch = "x86_64"))]
fn sw_protected_vm(_kvm: &Kvm) -> bool {
    false
}

/// Guest physical address of the page with an x86 processor's first instruction.
const RESET_PAGE: u64 = 0xffff_f000;

/// x86's `hlt`: what the guest executes where nothing stops it.
const HLT: u8 = 0xf4;

/// Runs a guest of one page, whose bit is set.
fn try_userfault(vm: VmFd) -> Userfault {
    let Ok((mapping, words)) = scratch() else { return Userfault::Untried };
    let (vm, start) = (Arc::new(vm), GuestAddress(RESET_PAGE));
    let bitmap = Some(Bitmap::of_words(&words));
    let slot = Memslot::new(vm.clone(), 0, start, mapping.clone(), bitmap, KVM_MEM_USERFAULT);
    let refused = match slot {
        Ok(_slot) => return try_exit(&vm),
        Err(SlotError::Create { error, .. }) => error.errno(),
        Err(_) => return Userfault::Untried,
    };
    // The answer is about the flag only if KVM takes the same slot without it.
    match Memslot::new(vm, 0, start, mapping, None, 0) {
        Ok(_) => Userfault::Refused { errno: refused },
        Err(_) => Userfault::Untried,
    }
}

fn scratch() -> io::Result<(Arc<Mapping>, Arc<Words>)> {
    let words = Words::new(1)?;
    words[0].store(1, Ordering::Release);
    let page = Words::new(PAGE_SIZE as usize / 8)?;
    page.file().as_ref().write_all(&[HLT; PAGE_SIZE as usize])?;
    let mapping = Mapping::shared(page.file(), PAGE_SIZE, false)?;
    Ok((Arc::new(mapping), Arc::new(words)))
}

#[cfg(target_arch = "x86_64")]
fn try_exit(vm: &VmFd) -> Userfault {
    // A new vCPU begins at the reset vector, so it needs no other state.
    let Ok(mut vcpu) = vm.create_vcpu(0) else { return Userfault::Untried };
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MemoryFault {
                flags: KVM_MEMORY_EXIT_FLAG_USERFAULT,
                gpa: RESET_PAGE,
                ..
            }) => return Userfault::Works,
            Err(error) if error.errno() == libc::EINTR => {}
            _ => return Userfault::Ignored,
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn try_exit(_vm: &VmFd) -> Userfault {
    Userfault::Works
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        let cpuinfo = |flags: &str| format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t: svm\n");
        assert_eq!(virtualization_of(&cpuinfo("fpu vmx")), Virtualization::Vmx);
        assert_eq!(virtualization_of(&cpuinfo("svm fpu")), Virtualization::Svm);
        assert_eq!(virtualization_of(&cpuinfo("fpu svm_lock")), Virtualization::Emulated);
        assert_eq!(virtualization_of(""), Virtualization::Unknown);
    }

    #[test]
    fn this_host_is_described() {
        let probe = probe();
        let json = serde_json::to_value(&probe).unwrap();
        assert_eq!(json["engines"][0]["engine"], "kvm-userfault");
        assert_eq!(json["usable"], probe.kvm.is_ok());
        match &probe.kvm {
            Ok(kvm) => {
                assert_eq!(json["api_version"], 12);
                assert_ne!(kvm.userfault, Userfault::Untried, "{probe:?}");
                assert_eq!(json["engines"][1]["usable"], true);
            }
            Err(error) => assert_eq!(json["error"], error.to_string()),
        }
        println!("{json:#}");
    }
}
