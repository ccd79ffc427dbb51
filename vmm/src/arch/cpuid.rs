// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The CPUID of guests, limited to features whose state can be saved and restored.
//!
//! Sources: `Documentation/virt/kvm/api.rst`, section `KVM_GET_SUPPORTED_CPUID`;
//! `Documentation/virt/kvm/x86/cpuid.rst` for KVM's own leaves; Intel's "Software Developer's
//! Manual", volume 2, instruction `CPUID`; AMD's "Architecture Programmer's Manual", volume 3,
//! appendix E.

use demand_kvm::hide_nested;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::arch::error::CpuidError;
use crate::arch::layout::{ADDRESS_SIZES, MAX_CPUS};

/// An output register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Eax, Ebx, Ecx, Edx};

impl Reg {
    fn name(self) -> &'static str {
        match self {
            Eax => "EAX",
            Ebx => "EBX",
            Ecx => "ECX",
            Edx => "EDX",
        }
    }

    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

/// The leaf with the features common to all processors.
const FEATURES: u32 = 1;
const EXTENDED_FEATURES: u32 = 7;
const XSAVE: u32 = 0xd;
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;

/// Leaf 1, ECX: the local APIC's timer supports TSC deadlines.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: the processor runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the field for the number of logical processors is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: the logical processors are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;

/// Feature bits hidden from all guests: leaf, subleaf, register, bits.
const HIDDEN: &[(u32, u32, Reg, u32)] = &[
    // MONITOR (3): KVM does not see that a guest is idle while it waits in MWAIT. DTES64 (2),
    // DS-CPL (4), PDCM (15): performance monitoring.
    (FEATURES, 0, Ecx, 1 << 2 | 1 << 3 | 1 << 4 | 1 << 15),
    // DS (21): performance monitoring.
    (FEATURES, 0, Edx, 1 << 21),
    // SGX (2): enclaves are encrypted memory. Intel PT (25): the processor writes its buffers by
    // physical address.
    (EXTENDED_FEATURES, 0, Ebx, 1 << 2 | 1 << 25),
    // SHSTK (7): KVM_GET_MSRS does not return the shadow stack pointer. SGX_LC (30).
    (EXTENDED_FEATURES, 0, Ecx, 1 << 7 | 1 << 30),
    // Architectural LBR (19), IBT (20), AMX (22, 24, 25).
    (EXTENDED_FEATURES, 0, Edx, 1 << 19 | 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25),
    // Performance monitoring (8), AMX_FP16 (21).
    (EXTENDED_FEATURES, 1, Eax, 1 << 8 | 1 << 21),
    // AMX_COMPLEX (8).
    (EXTENDED_FEATURES, 1, Edx, 1 << 8),
    // AMX state.
    (XSAVE, 0, Eax, AMX_STATE),
    // XFD (4), through which a guest requests AMX state.
    (XSAVE, 1, Eax, 1 << 4),
    // The states of Intel PT (8), CET (11, 12) and LBR (15).
    (XSAVE, 1, Ecx, 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15),
    // Asynchronous page faults (4), also in nested guests (10) and by interrupt (14): a snapshot
    // would lose a pending notice that a page is ready.
    (KVM_FEATURES, 0, Eax, 1 << 4 | 1 << 10 | 1 << 14),
    // IBS (10), PERFCTR_CORE (23), PERFCTR_NB (24), PERFCTR_LLC (28): performance monitoring.
    // MWAITX (29).
    (AMD_FEATURES, 0, Ecx, 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29),
];

/// Components of AMX state in XCR0.
const AMX_STATE: u32 = 1 << 17 | 1 << 18;

/// Leaves that describe only hidden features: zeros for all guests.
const HIDDEN_LEAVES: &[u32] = &[
    5,           // MONITOR and MWAIT.
    0xa,         // Performance monitoring.
    0x12,        // SGX.
    0x14,        // Intel PT.
    0x1c,        // Architectural LBR.
    0x1d,        // AMX: tiles.
    0x1e,        // AMX: multiplication.
    0x23,        // Performance monitoring.
    0x8000_001b, // IBS.
    0x8000_001f, // Encrypted memory.
    0x8000_0022, // Performance monitoring.
    0x8000_0026, // The host's topology.
];

/// Returns the CPUID that this host supports for guests, without topology; see [`for_vcpu`].
///
/// This is the CPUID that KVM supports, without the features that a snapshot cannot hold or would
/// record wrongly: nested virtualization, asynchronous page faults, performance monitoring, MWAIT,
/// SGX, AMX, Intel PT, LBR, shadow stacks, and encrypted memory.
///
/// # Errors
///
/// If KVM does not return its supported CPUID.
///
/// # Examples
///
/// ```
/// use demand_vmm::arch::cpuid::{check_host, for_vcpu, guest_cpuid};
///
/// let Ok(kvm) = demand_kvm::open_kvm() else { return };
/// let cpuid = guest_cpuid(&kvm).unwrap();
/// let vm = kvm.create_vm().unwrap();
/// let told = for_vcpu(&cpuid, 1, 4);
/// vm.create_vcpu(1).unwrap().set_cpuid2(&told).unwrap();
/// check_host(&told, &cpuid).unwrap();
/// ```
pub fn guest_cpuid(kvm: &Kvm) -> Result<CpuId, CpuidError> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
    hide(&mut cpuid);
    // KVM reports this feature through a capability, not in the CPUID.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        set(&mut cpuid, FEATURES, 0, Ecx, TSC_DEADLINE);
    }
    set(&mut cpuid, FEATURES, 0, Ecx, HYPERVISOR);
    Ok(cpuid)
}

/// Removes the hidden features.
fn hide(cpuid: &mut CpuId) {
    hide_nested(cpuid);
    for entry in cpuid.as_mut_slice() {
        if HIDDEN_LEAVES.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        // Size and offset of hidden XSAVE states.
        let states = [8, 11, 12, 15, 17, 18];
        if entry.function == XSAVE && states.contains(&entry.index) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        for (leaf, subleaf, reg, bits) in HIDDEN {
            if (entry.function, entry.index) == (*leaf, *subleaf) {
                *reg.of_mut(entry) &= !bits;
            }
        }
    }
    let size = xsave_size(cpuid);
    for entry in cpuid.as_mut_slice() {
        if (entry.function, entry.index) == (XSAVE, 0) && entry.ecx != 0 {
            (entry.ebx, entry.ecx) = (size, size);
        }
    }
}

/// Returns the size of the states of XCR0 in the standard format, in bytes: 512 for FXSAVE, 64 for
/// the header, and the extended states behind them.
fn xsave_size(cpuid: &CpuId) -> u32 {
    let states = find(cpuid, XSAVE, 0).map_or(0, |entry| entry.eax);
    let behind = cpuid.as_slice().iter().filter(|entry| {
        entry.function == XSAVE && (2..32).contains(&entry.index) && states >> entry.index & 1 == 1
    });
    behind.map(|entry| entry.ebx + entry.eax).fold(576, u32::max)
}

/// Returns the CPUID of vCPU `cpu` in a guest of `cpus` vCPUs, at most [`MAX_CPUS`]: one package of
/// `cpus` cores without hyper-threads. The APIC ID is `cpu`.
pub fn for_vcpu(cpuid: &CpuId, cpu: u32, cpus: u32) -> CpuId {
    debug_assert!(cpu < cpus && cpus <= MAX_CPUS);
    // Number of APIC ID bits that distinguish cores.
    let width = cpus.next_power_of_two().trailing_zeros();
    let ids = 1 << width;
    let highest = find(cpuid, 0, 0).map_or(0, |entry| entry.eax);
    let amd = is_amd(cpuid);
    let mut entries: Vec<_> = cpuid.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in &mut entries {
        match entry.function {
            FEATURES => {
                entry.ebx = cpu << 24 | ids << 16 | entry.ebx & 0xffff;
                entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Caches. Bits 5 to 7 are the level. Level 3 and above are shared, the others belong to
            // one core.
            4 if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                entry.eax = (ids - 1) << 26 | shared << 14 | entry.eax & 0x3fff;
            }
            AMD_FEATURES if amd => {
                let legacy = if cpus > 1 { CMP_LEGACY } else { 0 };
                entry.ecx = entry.ecx & !CMP_LEGACY | legacy;
            }
            ADDRESS_SIZES if amd => {
                entry.ecx = entry.ecx & !0xf0ff | width << 12 | (cpus - 1);
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 };
                entry.eax = shared << 14 | entry.eax & 0x3fff;
            }
            // KVM leaves this leaf zeroed. It holds the extended APIC ID and the core ID; a guest
            // reads it only if it has TOPOEXT.
            0x8000_001e if amd => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (cpu, cpu, 0, 0),
            _ => {}
        }
    }
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= highest) {
        // For each level: the shift from an APIC ID to the ID of the next level, the number of
        // processors, and the level's type.
        for (index, (shift, processors, kind)) in
            (0..).zip([(0, 1, 1), (width, cpus, 2), (0, 0, 0)])
        {
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: kind << 8 | index,
                edx: cpu,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).expect("six entries more than KVM's are few enough")
}

/// The leaf of the TSC frequency and the crystal frequency.
const TSC_FREQUENCY: u32 = 0x15;
/// The leaf that holds the highest hypervisor leaf.
const HYPERVISOR_LEAVES: u32 = 0x4000_0000;
/// The hypervisor's leaf of frequencies, in kHz: the TSC's, and the local APIC timer's.
const HYPERVISOR_FREQUENCIES: u32 = 0x4000_0010;
/// The frequency of KVM's local APIC timer, in kHz.
const APIC_KHZ: u32 = 1_000_000;
/// Tolerance of a frequency in leaf 0x15, in parts per million: that of a crystal.
const CRYSTAL_PPM: u64 = 20;

/// Adds the TSC frequency, in kHz, to a vCPU's CPUID, for systems that do not support kvm-clock and
/// cannot or need not measure the frequency. 0 means unknown, and adds nothing.
///
/// Intel processors state the frequency as a ratio to that of the crystal. The crystal also drives
/// the local APIC timer, so its frequency is 1 GHz here. Leaf 0x16 would add nothing, and stays
/// empty.
pub fn with_frequency(cpuid: &CpuId, tsc_khz: u32) -> CpuId {
    let highest = find(cpuid, 0, 0).map_or(0, |entry| entry.eax);
    let mut entries = cpuid.as_slice().to_vec();
    let leaves = entries.iter_mut().find(|entry| entry.function == HYPERVISOR_LEAVES);
    let Some(leaves) = leaves.filter(|_| tsc_khz != 0) else {
        return cpuid.clone();
    };
    leaves.eax = leaves.eax.max(HYPERVISOR_FREQUENCIES);
    let mut put = |function, [eax, ebx, ecx]: [u32; 3]| {
        entries.retain(|entry| entry.function != function);
        entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, ..Default::default() });
    };
    put(HYPERVISOR_FREQUENCIES, [tsc_khz, APIC_KHZ, 0]);
    if vendor(cpuid) == INTEL
        && highest >= TSC_FREQUENCY
        && let Some((numerator, denominator)) = ratio(tsc_khz)
    {
        put(TSC_FREQUENCY, [denominator, numerator, APIC_KHZ * 1000]);
    }
    CpuId::from_entries(&entries).expect("two entries more than KVM's are few enough")
}

/// Returns the TSC frequency as a ratio to [`APIC_KHZ`]: its continued fraction, expanded as long
/// as the product of numerator and `APIC_KHZ` fits the 32 bits in which Linux computes it.
fn ratio(tsc_khz: u32) -> Option<(u32, u32)> {
    const MOST: u64 = (u32::MAX / APIC_KHZ) as u64;
    let (mut rest, mut divisor) = (u64::from(tsc_khz), u64::from(APIC_KHZ));
    let ((mut before, mut numerator), (mut under, mut denominator)) = ((0, 1), (1, 0));
    while divisor != 0 {
        let whole = rest / divisor;
        let next = whole * numerator + before;
        if next > MOST {
            break;
        }
        (before, numerator) = (numerator, next);
        (under, denominator) = (denominator, whole * denominator + under);
        (rest, divisor) = (divisor, rest % divisor);
    }
    let told = u64::from(APIC_KHZ) * numerator / denominator.max(1);
    let off = told.abs_diff(tsc_khz.into()) * 1_000_000;
    let close = denominator != 0 && off <= u64::from(tsc_khz) * CRYSTAL_PPM;
    let both = u32::try_from(numerator).ok().zip(u32::try_from(denominator).ok());
    both.filter(|_| close)
}

/// Leaves of features to compare: leaf, subleaf, register, and the bits to ignore, which are not
/// features or change while the guest runs.
const CHECKED: &[(u32, u32, Reg, u32)] = &[
    // MWAIT and OSXSAVE follow the guest's settings. The VMM sets the hypervisor bit.
    (FEATURES, 0, Ecx, 1 << 3 | 1 << 27 | HYPERVISOR),
    // APIC follows the guest's settings, HTT the number of vCPUs.
    (FEATURES, 0, Edx, 1 << 9 | HTT),
    (6, 0, Eax, 0),
    (EXTENDED_FEATURES, 0, Ebx, 0),
    // OSPKE follows the guest's settings. MAWAU is a number.
    (EXTENDED_FEATURES, 0, Ecx, 1 << 4 | 0x1f << 17),
    (EXTENDED_FEATURES, 0, Edx, 0),
    (EXTENDED_FEATURES, 1, Eax, 0),
    (EXTENDED_FEATURES, 1, Ebx, 0),
    (EXTENDED_FEATURES, 1, Ecx, 0),
    (EXTENDED_FEATURES, 1, Edx, 0),
    (EXTENDED_FEATURES, 2, Edx, 0),
    (XSAVE, 0, Eax, 0),
    (XSAVE, 0, Edx, 0),
    (XSAVE, 1, Eax, 0),
    (XSAVE, 1, Ecx, 0),
    (XSAVE, 1, Edx, 0),
    (KVM_FEATURES, 0, Eax, 0),
    (AMD_FEATURES, 0, Ecx, CMP_LEGACY),
    (AMD_FEATURES, 0, Edx, 1 << 9),
    (0x8000_0007, 0, Edx, 0),
    (ADDRESS_SIZES, 0, Ebx, 0),
    (0x8000_0021, 0, Eax, 0),
];

/// Checks that this host's KVM supports a guest whose vCPUs had these CPUIDs (`KVM_GET_CPUID2`).
///
/// # Errors
///
/// As for [`check_host`]; and if KVM does not return its CPUID.
pub fn check_kvm(saved: &[CpuId], kvm: &Kvm) -> Result<(), CpuidError> {
    let host = guest_cpuid(kvm)?;
    let check = |host: &CpuId| saved.iter().try_for_each(|saved| check_host(saved, host));
    check(&host).or_else(|error| match as_shown(&host, kvm) {
        // An emulating KVM shows features of the processor that it does not list as supported.
        Some(shown) => check(&shown),
        None => Err(error),
    })
}

/// Returns the CPUID that KVM shows to a vCPU which was given `cpuid`, if KVM creates one.
fn as_shown(cpuid: &CpuId, kvm: &Kvm) -> Option<CpuId> {
    let vcpu = kvm.create_vm().ok()?.create_vcpu(0).ok()?;
    vcpu.set_cpuid2(&for_vcpu(cpuid, 0, 1)).ok()?;
    vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok()
}

/// Checks that this host's KVM supports a guest. `saved` is the CPUID of one of its vCPUs
/// ([`for_vcpu`], `KVM_GET_CPUID2`), and `host` the result of [`guest_cpuid`] on this host.
///
/// # Errors
///
/// The first mismatch: the vendor or family, a feature by leaf, register and bits, the layout of
/// the XSAVE area, or the width of physical addresses.
pub fn check_host(saved: &CpuId, host: &CpuId) -> Result<(), CpuidError> {
    let (its, ours) = (vendor(saved), vendor(host));
    if its != ours {
        return Err(CpuidError::Differs { what: "vendor", its, ours });
    }
    let (its, ours) = (family(saved), family(host));
    if its != ours {
        let (its, ours) = (format!("{its:#x}"), format!("{ours:#x}"));
        return Err(CpuidError::Differs { what: "family", its, ours });
    }
    for (leaf, subleaf, reg, ignored) in CHECKED {
        let value = |cpuid| find(cpuid, *leaf, *subleaf).map_or(0, |entry| reg.of(entry));
        let lacking = value(saved) & !value(host) & !ignored;
        if lacking != 0 {
            return Err(CpuidError::Lacking {
                leaf: *leaf,
                subleaf: *subleaf,
                register: reg.name(),
                bits: (0..32).filter(|bit| lacking >> bit & 1 == 1).collect(),
            });
        }
    }
    // The guest keeps XSAVE areas in its memory, so the offsets of the states must match.
    let states = find(saved, XSAVE, 0).map_or(0, |entry| entry.eax);
    for state in (2..32).filter(|state| states >> state & 1 == 1) {
        let place = |cpuid| find(cpuid, XSAVE, state).map(|entry| (entry.ebx, entry.eax));
        if place(saved) != place(host) {
            return Err(CpuidError::Xsave { state });
        }
    }
    let bits = |cpuid| find(cpuid, ADDRESS_SIZES, 0).map_or(36, |entry| entry.eax & 0xff);
    let (its, ours) = (bits(saved), bits(host));
    if its > ours {
        return Err(CpuidError::Width { its, ours });
    }
    Ok(())
}

fn find(cpuid: &CpuId, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    let mut entries = cpuid.as_slice().iter();
    entries.find(|entry| (entry.function, entry.index) == (leaf, subleaf))
}

fn set(cpuid: &mut CpuId, leaf: u32, subleaf: u32, reg: Reg, bits: u32) {
    let entries = cpuid.as_mut_slice().iter_mut();
    for entry in entries.filter(|entry| (entry.function, entry.index) == (leaf, subleaf)) {
        *reg.of_mut(entry) |= bits;
    }
}

/// Returns the vendor in leaf 0, for example `GenuineIntel`.
fn vendor(cpuid: &CpuId) -> String {
    let entry = find(cpuid, 0, 0).copied().unwrap_or_default();
    let bytes = [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes);
    bytes.map(char::from).filter(char::is_ascii_graphic).collect()
}

const INTEL: &str = "GenuineIntel";

fn is_amd(cpuid: &CpuId) -> bool {
    matches!(vendor(cpuid).as_str(), "AuthenticAMD" | "HygonGenuine")
}

/// Returns the sum of family and extended family, as the manuals define it.
fn family(cpuid: &CpuId) -> u32 {
    let signature = find(cpuid, FEATURES, 0).map_or(0, |entry| entry.eax);
    let family = signature >> 8 & 0xf;
    if family == 0xf { family + (signature >> 20 & 0xff) } else { family }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demand_kvm::{Virtualization, open_kvm};
    use test_support::host::skip;

    fn host() -> Option<(Kvm, CpuId)> {
        let kvm = open_kvm().map_err(|error| skip(&error.to_string())).ok()?;
        let cpuid = guest_cpuid(&kvm).unwrap();
        Some((kvm, cpuid))
    }

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// Returns the CPUID of a processor of `vendor` with every bit of these leaves set.
    fn full(vendor: &[u8; 12]) -> CpuId {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let all = [u32::MAX; 4];
        let mut entries = vec![entry(0, 0, [0x1f, word(0), word(8), word(4)])];
        let leaves = HIDDEN.iter().chain(CHECKED).map(|(leaf, subleaf, ..)| (*leaf, *subleaf));
        let leaves = leaves.chain(HIDDEN_LEAVES.iter().map(|leaf| (*leaf, 0)));
        let leaves = leaves.chain([(XSAVE, 17), (0x8000_000a, 0), (0x8000_001e, 0)]);
        let leaves = leaves.chain([(HYPERVISOR_LEAVES, 0)]);
        for (leaf, subleaf) in leaves {
            if !entries.iter().any(|e| (e.function, e.index) == (leaf, subleaf)) {
                entries.push(entry(leaf, subleaf, all));
            }
        }
        // AVX state, with the same layout everywhere; caches of levels 1 and 3.
        entries.push(entry(XSAVE, 2, [0x100, 0x240, 0, 0]));
        for leaf in [4, 0x8000_001d] {
            entries.push(entry(leaf, 0, [0x21, 1, 2, 3]));
            entries.push(entry(leaf, 3, [0x63, 1, 2, 3]));
        }
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn only_unrestorable_features_are_hidden() {
        let before = full(b"GenuineIntel");
        let mut after = before.clone();
        hide(&mut after);
        for (leaf, subleaf, reg, bits) in HIDDEN {
            let left = reg.of(find(&after, *leaf, *subleaf).unwrap());
            // `hide_nested` also hides nested virtualization.
            let nested = match (*leaf, *reg) {
                (FEATURES, Ecx) => 1 << 5,
                (AMD_FEATURES, Ecx) => 1 << 2,
                _ => 0,
            };
            assert_eq!(left, !(bits | nested), "leaf {leaf:#x} {reg:?}");
        }
        for leaf in HIDDEN_LEAVES.iter().chain(&[0x8000_000a]) {
            let entry = find(&after, *leaf, 0).unwrap();
            assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (0, 0, 0, 0), "{leaf:#x}");
        }
        assert_eq!(find(&after, XSAVE, 0).unwrap().ecx, 0x340);
        assert_eq!(find(&after, XSAVE, 17).unwrap().eax, 0);
    }

    #[test]
    fn topology_is_the_same_in_all_leaves() {
        for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
            let amd = vendor == b"AuthenticAMD";
            for (cpus, width) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4)] {
                for cpu in 0..cpus {
                    let cpuid = for_vcpu(&full(vendor), cpu, cpus);
                    let leaf = |function, index| *find(&cpuid, function, index).unwrap();
                    assert_eq!(leaf(1, 0).ebx >> 16, cpu << 8 | 1 << width);
                    assert_eq!(leaf(1, 0).edx & HTT != 0, cpus > 1);
                    for function in [0xb, 0x1f] {
                        let levels = [leaf(function, 0), leaf(function, 1), leaf(function, 2)];
                        let levels = levels.map(|e| (e.eax, e.ebx, e.ecx, e.edx));
                        let expected =
                            [(0, 1, 0x100, cpu), (width, cpus, 0x201, cpu), (0, 0, 2, cpu)];
                        assert_eq!(levels, expected);
                    }
                    assert_eq!(leaf(4, 0).eax, ((1 << width) - 1) << 26 | 0x21);
                    let shared = (1 << width) - 1;
                    assert_eq!(leaf(4, 3).eax, shared << 26 | shared << 14 | 0x63);
                    assert_eq!(leaf(0x8000_001d, 3).eax, (cpus - 1) << 14 | 0x63);
                    if amd {
                        assert_eq!(leaf(AMD_FEATURES, 0).ecx & CMP_LEGACY != 0, cpus > 1);
                        assert_eq!(leaf(ADDRESS_SIZES, 0).ecx & 0xf0ff, width << 12 | (cpus - 1));
                        assert_eq!((leaf(0x8000_001e, 0).eax, leaf(0x8000_001e, 0).ecx), (cpu, 0));
                    } else {
                        assert_eq!(leaf(ADDRESS_SIZES, 0).ecx, u32::MAX);
                    }
                }
            }
        }
    }

    #[test]
    fn frequency_is_reported_as_systems_compute_it() {
        for khz in [800_000, 1_000_000, 2_399_998, 2_595_124, 2_999_990, 3_700_000, 4_200_001] {
            let intel = with_frequency(&full(b"GenuineIntel"), khz);
            let leaf = |cpuid, leaf| *find(cpuid, leaf, 0).unwrap();
            let hypervisor = leaf(&intel, HYPERVISOR_FREQUENCIES);
            assert_eq!((hypervisor.eax, hypervisor.ebx), (khz, 1_000_000));
            assert!(leaf(&intel, HYPERVISOR_LEAVES).eax >= HYPERVISOR_FREQUENCIES);
            // Computed as in Linux, in 32 bits.
            let told = leaf(&intel, TSC_FREQUENCY);
            assert_eq!(told.ecx, 1_000_000_000);
            let computed = (told.ecx / 1000).checked_mul(told.ebx).unwrap() / told.eax;
            assert!(computed.abs_diff(khz) <= khz / 50_000, "{khz} kHz: {computed}");
            check_host(&intel, &full(b"GenuineIntel")).unwrap();
        }
        assert_eq!(ratio(2_400_000), Some((12, 5)));
        // No simple ratio is close enough.
        assert_eq!(ratio(3_000_100), None);
        let amd = with_frequency(&full(b"AuthenticAMD"), 2_400_000);
        assert!(find(&amd, TSC_FREQUENCY, 0).is_none());
        assert_eq!(find(&amd, HYPERVISOR_FREQUENCIES, 0).unwrap().eax, 2_400_000);
        let unknown = with_frequency(&full(b"GenuineIntel"), 0);
        assert!(find(&unknown, HYPERVISOR_FREQUENCIES, 0).is_none());
    }

    #[test]
    fn host_lacking_a_feature_is_refused_by_name() {
        let mut host = full(b"GenuineIntel");
        hide(&mut host);
        let saved = for_vcpu(&host, 1, 2);
        check_host(&saved, &host).unwrap();
        let refused = |change: &dyn Fn(&mut kvm_cpuid_entry2)| {
            let mut other = host.clone();
            other.as_mut_slice().iter_mut().for_each(change);
            let more = check_host(&for_vcpu(&other, 0, 1), &host);
            let less = check_host(&saved, &other);
            match (more, less) {
                (_, Err(error)) => error.to_string(),
                (more, _) => more.unwrap_err().to_string(),
            }
        };
        for (change, says) in [
            (
                &(|e: &mut kvm_cpuid_entry2| {
                    if e.function == 7 && e.index == 0 {
                        e.ebx &= !(1 << 16 | 1 << 30);
                    }
                }) as &dyn Fn(&mut kvm_cpuid_entry2),
                "leaf 0x7, subleaf 0, EBX, bits 16, 30;",
            ),
            (&|e| e.eax &= !(u32::from(e.function == KVM_FEATURES) << 5), "leaf 0x40000001"),
            (&|e| e.ebx ^= u32::from(e.function == 0), "vendor GenuineIntel"),
            (&|e| e.eax ^= u32::from(e.function == 1) << 20, "family"),
            (&|e| e.ebx ^= u32::from(e.function == XSAVE && e.index == 2) << 8, "state 2"),
            (&|e| e.eax ^= u32::from(e.function == ADDRESS_SIZES), "physical addresses"),
        ] {
            let error = refused(change);
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn kvm_accepts_the_guests_cpuid() {
        let Some((kvm, cpuid)) = host() else { return };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        assert_ne!(find(&cpuid, FEATURES, 0).unwrap().ecx & HYPERVISOR, 0);
        for cpu in 0..2u32 {
            let vcpu = vm.create_vcpu(cpu.into()).unwrap();
            vcpu.set_cpuid2(&for_vcpu(&cpuid, cpu, 2)).unwrap();
            let now = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
            if demand_kvm::probe().virtualization == Virtualization::Emulated {
                skip("this KVM emulates, and adds to what a guest is told");
            } else {
                check_host(&now, &cpuid).unwrap();
            }
            assert_eq!(find(&now, FEATURES, 0).unwrap().ebx >> 24, cpu);
        }
    }
}
