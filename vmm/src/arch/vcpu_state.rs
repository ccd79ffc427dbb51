// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The complete KVM state of a vCPU, for saving and restoring.
//!
//! Sources: `Documentation/virt/kvm/api.rst`; for dependencies between the parts,
//! `arch/x86/kvm/x86.c` and `arch/x86/kvm/lapic.c`.

use demand_kvm::own_pages;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::arch::error::VcpuStateError;
use crate::arch::hex;
use crate::arch::sregs2::{pdptrs, set_with_pdptrs};
use crate::arch::tsc::{self, Moment};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// Number of MSRs that KVM reads or sets in one call: fewer than `MAX_IO_MSRS`, which is 256.
const MSRS_AT_ONCE: usize = 255;

/// Hyper-V's registers, which are offered to no guest, and some of which count time.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

/// Returns the registers that `KVM_GET_MSR_INDEX_LIST` omits although guests set them: the memory
/// types (MTRR), and AMD's `DE_CFG`.
fn unlisted() -> impl Iterator<Item = u32> {
    let mtrr = (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff]);
    mtrr.chain([0xc001_1029])
}

/// The parts of a vCPU's state on this host, which are the same for all vCPUs of a VM.
#[derive(Clone, Debug)]
pub struct StateShape {
    /// The MSRs to save; those that depend on others come last.
    msrs: Vec<u32>,
    /// Size of the XSAVE area, in bytes; `None` if KVM has only the area of 4096 bytes.
    xsave_bytes: Option<usize>,
    /// Whether KVM reports PDPTRs separately from memory.
    sregs2: bool,
}

impl StateShape {
    /// Queries KVM.
    ///
    /// After this, the process must not request more processor states (`arch_prctl`,
    /// `ARCH_REQ_XCOMP_GUEST_PERM`).
    ///
    /// # Errors
    ///
    /// If KVM does not list its MSRs.
    pub fn of(kvm: &Kvm, vm: &VmFd) -> Result<Self, VcpuStateError> {
        let listed = kvm.get_msr_index_list().map_err(VcpuStateError::MsrList)?;
        let mut msrs: Vec<_> = listed.as_slice().to_vec();
        msrs.extend(unlisted());
        msrs.retain(|msr| !HYPERV.contains(msr));
        msrs.sort_unstable();
        msrs.dedup();
        // A deadline depends on the counter, so it comes after it.
        msrs.sort_by_key(|msr| match *msr {
            TSC => 1,
            TSC_DEADLINE => 2,
            _ => 0,
        });
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let sregs2 = vm.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0;
        Ok(StateShape { msrs, xsave_bytes: (xsave_bytes > 0).then_some(xsave_bytes), sregs2 })
    }

    /// Returns an area of the length that KVM expects.
    fn xsave(&self) -> Xsave {
        let more = self.xsave_bytes.unwrap_or(0).saturating_sub(size_of::<kvm_xsave>());
        Xsave::new(more.div_ceil(size_of::<u32>())).expect("some kilobytes of memory")
    }
}

/// A vCPU's state, which [`save`](Self::save) reads and [`restore`](Self::restore) sets, in JSON or
/// another format of serde. When it is saved, the vCPU must have no pending I/O
/// ([`DemandVcpu::complete_pending_io`](demand_kvm::DemandVcpu::complete_pending_io)), and all
/// vCPUs of the VM must be paused.
///
/// It does not include nested guests, which [`guest_cpuid`](crate::arch::cpuid::guest_cpuid) rules
/// out.
///
/// A VM is restored in this order:
/// [`VmState::restore_clock`](crate::arch::vm_state::VmState::restore_clock), the pages of
/// [`own_pages`](Self::own_pages), the vCPUs by number,
/// [`VmState::restore`](crate::arch::vm_state::VmState::restore).
///
/// # Examples
///
/// ```
/// use demand_vmm::arch::vcpu_state::{StateShape, VcpuState};
///
/// let Ok(kvm) = demand_kvm::open_kvm() else { return };
/// let vcpu = |id| {
///     let vm = kvm.create_vm().unwrap();
///     vm.create_irq_chip().unwrap();
///     (StateShape::of(&kvm, &vm).unwrap(), vm.create_vcpu(id).unwrap())
/// };
/// let (shape, one) = vcpu(0);
/// // (Should this KVM have all that takes.)
/// let Ok(state) = VcpuState::save(0, &one, &shape) else { return };
/// let json = serde_json::to_string(&state).unwrap();
/// let (shape, other) = vcpu(0);
/// serde_json::from_str::<VcpuState>(&json).unwrap().restore(0, &other, &shape).unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The guest's CPUID: leaf, subleaf, flags, EAX, EBX, ECX, EDX.
    cpuid: Vec<[u32; 7]>,
    /// The difference between its TSC and the host's, if KVM reports it.
    tsc_offset: Option<u64>,
    /// The frequency of its TSC, in kHz, if KVM knows it.
    tsc_khz: Option<u32>,
    #[serde(with = "hex")]
    mp_state: kvm_mp_state,
    #[serde(with = "hex")]
    regs: kvm_regs,
    #[serde(with = "hex")]
    sregs: kvm_sregs,
    /// The page-directory pointers, if they are loaded and KVM reports them separately from memory.
    pdptrs: Option<[u64; 4]>,
    /// The state of the FPU and all other XSAVE states, in the standard format.
    #[serde(with = "hex::area")]
    xsave: Vec<u8>,
    #[serde(with = "hex")]
    xcrs: kvm_xcrs,
    #[serde(with = "hex")]
    debugregs: kvm_debugregs,
    #[serde(with = "hex")]
    lapic: kvm_lapic_state,
    /// Indices and values, in the order in which they are set.
    msrs: Vec<(u32, u64)>,
    #[serde(with = "hex")]
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of vCPU `cpu`, on the vCPU's thread. The guest sees no change.
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line that names the vCPU and the step.
    pub fn save(cpu: u32, vcpu: &VcpuFd, shape: &StateShape) -> Result<Self, VcpuStateError> {
        let on = On { cpu, verb: "save" };
        // First, because KVM handles INIT and SIPI from other processors before it answers.
        let mp_state = on.step("its MP state", vcpu.get_mp_state())?;
        let cpuid = on.step("its CPUID", vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        let regs = on.step("its registers", vcpu.get_regs())?;
        let sregs = on.step("its system registers", vcpu.get_sregs())?;
        let pdptrs = match shape.sregs2 {
            true => on.step("its page-directory pointers", pdptrs(vcpu))?,
            false => None,
        };
        let xsave = on.step("its FPU's state", get_xsave(vcpu, shape))?;
        let xcrs = on.step("its extended control registers", vcpu.get_xcrs())?;
        let debugregs = on.step("its debug registers", vcpu.get_debug_regs())?;
        // The timer's deadline before the interrupt that it becomes: the deadline may expire in
        // between, and then it is better saved twice than not at all.
        let msrs = on.step("its MSRs", get_msrs(vcpu, &shape.msrs))?;
        let lapic = on.step("its local APIC", vcpu.get_lapic())?;
        let events = on.step("its pending events", vcpu.get_vcpu_events())?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().iter().map(leaf_to_array).collect(),
            // EIO: an unstable TSC has no frequency.
            tsc_khz: vcpu.get_tsc_khz().ok(),
            tsc_offset: tsc::offset(vcpu),
            mp_state,
            regs,
            sregs,
            pdptrs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            msrs,
            events,
        })
    }

    /// Sets the state of vCPU `cpu`, which must never have run, on the vCPU's thread. Meanwhile KVM
    /// reads and writes the pages of [`own_pages`](Self::own_pages).
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line that names the vCPU and the step. The vCPU is unusable then.
    pub fn restore(
        &self,
        cpu: u32,
        vcpu: &VcpuFd,
        shape: &StateShape,
    ) -> Result<(), VcpuStateError> {
        let on = On { cpu, verb: RESTORE };
        // First, because CPUID decides which values the registers may hold.
        on.step("its CPUID", self.cpuid().and_then(|cpuid| vcpu.set_cpuid2(&cpuid)))?;
        self.restore_tsc_khz(&on, vcpu)?;
        self.set(&on, vcpu, shape)
    }

    /// Sets the state of vCPU `cpu`, which may have run, on the vCPU's thread. CPUID stays, because
    /// it is fixed for the life of the vCPU; so do the MSRs that describe features (such as
    /// `DE_CFG`), which KVM does not change once the vCPU has run.
    ///
    /// # Errors
    ///
    /// As for [`restore`](Self::restore).
    pub(crate) fn reset(
        &self,
        cpu: u32,
        vcpu: &VcpuFd,
        shape: &StateShape,
    ) -> Result<(), VcpuStateError> {
        self.set(&On { cpu, verb: RESET }, vcpu, shape)
    }

    fn set(&self, on: &On, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), VcpuStateError> {
        on.step("its registers", vcpu.set_regs(&self.regs))?;
        // Before the local APIC, because a register here decides whether it is on, and its mode.
        let sregs = match self.pdptrs {
            Some(pdptrs) if shape.sregs2 => set_with_pdptrs(vcpu, &self.sregs, pdptrs),
            _ => vcpu.set_sregs(&self.sregs),
        };
        on.step("its system registers", sregs)?;
        // Processors without XSAVE have none, and KVM then refuses even an empty set.
        if self.xcrs.nr_xcrs > 0 {
            on.step("its extended control registers", vcpu.set_xcrs(&self.xcrs))?;
        }
        self.restore_xsave(on, vcpu, shape)?;
        on.step("its debug registers", vcpu.set_debug_regs(&self.debugregs))?;
        // Before the MSRs: a timer accepts a deadline only in the mode that waits for one.
        on.step("its local APIC", vcpu.set_lapic(&self.lapic))?;
        restore_msrs(&self.msrs, on, vcpu)?;
        // After the registers, because setting those clears pending exceptions.
        on.step("its pending events", vcpu.set_vcpu_events(&self.events))?;
        on.step("its MP state", vcpu.set_mp_state(self.mp_state))
    }

    /// Makes the vCPU's TSC continue from its value at `then`, a moment on the host that it was
    /// saved on, by as much as kvm-clock has advanced until `now`. Call it last, on the vCPU's
    /// thread. Without it, the TSC continues from the value that its MSR had when it was read.
    pub(crate) fn align_tsc(
        &self,
        cpu: u32,
        vcpu: &VcpuFd,
        then: Moment,
        now: Moment,
    ) -> Result<(), VcpuStateError> {
        let (Some(offset), Some(khz)) = (self.tsc_offset, self.tsc_khz) else { return Ok(()) };
        // Offsets of scaled counters are not in the host's ticks.
        let scaled = vcpu.get_tsc_khz().is_ok_and(|ours| !tsc::is_as_fast(khz, ours));
        if scaled || tsc::offset(vcpu).is_none() {
            return Ok(());
        }
        let on = On { cpu, verb: RESTORE };
        let offset = tsc::offset_since(offset, then, now, khz);
        on.step("its TSC's offset", tsc::set_offset(vcpu, offset))
    }

    /// Returns the guest pages that KVM reads and writes while this state is set, and later when
    /// the vCPU runs: page addresses, in order, without duplicates; see [`own_pages`]. They must be
    /// fetched before [`restore`](Self::restore), by
    /// [`FaultHandler::fetch_pages`](demand_kvm::FaultHandler::fetch_pages).
    pub fn own_pages(&self) -> Vec<GuestAddress> {
        let msrs: Vec<_> = self.msrs.iter().map(|(index, data)| msr_entry(*index, *data)).collect();
        // KVM does not read the pointers from memory if it gets them here, but a host that cannot
        // take them does read them.
        own_pages(&msrs, Some(&self.sregs))
    }

    /// Returns the guest's CPUID, for [`check_host`](crate::arch::cpuid::check_host).
    ///
    /// # Errors
    ///
    /// If there are more leaves than KVM takes.
    pub fn guest_cpuid(&self) -> Result<CpuId, VcpuStateError> {
        self.cpuid().map_err(|_| VcpuStateError::Leaves {
            leaves: self.cpuid.len(),
            most: KVM_MAX_CPUID_ENTRIES,
        })
    }

    fn cpuid(&self) -> Result<CpuId, kvm_ioctls::Error> {
        let entries: Vec<_> = self.cpuid.iter().map(leaf_from_array).collect();
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }

    fn restore_tsc_khz(&self, on: &On, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let (Some(its), Ok(ours)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return Ok(()) };
        if tsc::is_as_fast(its, ours) {
            return Ok(());
        }
        vcpu.set_tsc_khz(its).map_err(|source| VcpuStateError::Frequency {
            cpu: on.cpu,
            its,
            ours,
            source,
        })
    }

    fn restore_xsave(
        &self,
        on: &On,
        vcpu: &VcpuFd,
        shape: &StateShape,
    ) -> Result<(), VcpuStateError> {
        if self.xsave.len() < size_of::<kvm_xsave>() {
            return Err(VcpuStateError::ShortXsave {
                cpu: on.cpu,
                bytes: self.xsave.len(),
                least: size_of::<kvm_xsave>(),
            });
        }
        let mut area = shape.xsave();
        let room = size_of::<kvm_xsave>() + size_of_val(area.as_slice());
        let (fits, more) = self.xsave.split_at(room.min(self.xsave.len()));
        if more.iter().any(|byte| *byte != 0) {
            return Err(VcpuStateError::LongXsave { cpu: on.cpu, bytes: self.xsave.len(), room });
        }
        let words: Vec<_> = fits.chunks(4).map(word).collect();
        // SAFETY: this does not change the structure's length field.
        let head = unsafe { &mut area.as_mut_fam_struct().xsave.region };
        let (first, rest) = words.split_at(head.len().min(words.len()));
        head[..first.len()].copy_from_slice(first);
        area.as_mut_slice()[..rest.len()].copy_from_slice(rest);
        // SAFETY: the area has the length that KVM reported for this VM, and the call reads no
        // more.
        on.step("its FPU's state", unsafe { vcpu.set_xsave2(&area) })
    }
}

/// The verb of errors while a snapshot's state is set.
const RESTORE: &str = "restore";
/// The verb of errors while the reset state is set.
const RESET: &str = "reset";

/// The vCPU and the operation, for errors.
struct On {
    cpu: u32,
    verb: &'static str,
}

impl On {
    fn step<T>(
        &self,
        part: &'static str,
        result: Result<T, kvm_ioctls::Error>,
    ) -> Result<T, VcpuStateError> {
        let On { cpu, verb } = *self;
        result.map_err(|source| match verb {
            RESTORE => VcpuStateError::Refused { cpu, part, source },
            _ => VcpuStateError::Access { verb, cpu, part, source },
        })
    }
}

fn restore_msrs(msrs: &[(u32, u64)], on: &On, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    let entries: Vec<_> = msrs.iter().map(|(index, data)| msr_entry(*index, *data)).collect();
    let mut left = &entries[..];
    while !left.is_empty() {
        let chunk = &left[..left.len().min(MSRS_AT_ONCE)];
        let msrs = Msrs::from_entries(chunk).expect("no more than there may be");
        let set = on.step("its MSRs", vcpu.set_msrs(&msrs))?;
        left = &left[set..];
        if set == chunk.len() {
            continue;
        }
        // KVM stopped at an MSR that it does not set. Some are read-only, and may have the value
        // already.
        let kvm_msr_entry { index, data, .. } = left[0];
        let now = on.step("its MSRs", get_msrs(vcpu, &[index]))?;
        if now.first() != Some(&(index, data)) && on.verb != RESET {
            return Err(VcpuStateError::Msr { cpu: on.cpu, index, data });
        }
        left = &left[1..];
    }
    Ok(())
}

/// Reads those of the given MSRs that can be read.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut read = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> = chunk.iter().map(|index| msr_entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("no more than there may be");
        let got = vcpu.get_msrs(&mut msrs)?;
        read.extend(msrs.as_slice()[..got].iter().map(|msr| (msr.index, msr.data)));
        // KVM stops at the first MSR that it does not have.
        let stopped = usize::from(got < chunk.len());
        left = &left[got + stopped..];
    }
    Ok(read)
}

fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn get_xsave(vcpu: &VcpuFd, shape: &StateShape) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    if shape.xsave_bytes.is_none() {
        return Ok(bytes(&vcpu.get_xsave()?.region));
    }
    let mut area = shape.xsave();
    // SAFETY: the area has the length that KVM reported for this VM, and the call writes no more.
    unsafe { vcpu.get_xsave2(&mut area) }?;
    Ok(bytes(&[&area.as_fam_struct_ref().xsave.region, area.as_slice()].concat()))
}

/// Converts up to four bytes to a word, the lowest first.
fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn leaf_to_array(leaf: &kvm_cpuid_entry2) -> [u32; 7] {
    [leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

fn leaf_from_array([function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: *function,
        index: *index,
        flags: *flags,
        eax: *eax,
        ebx: *ebx,
        ecx: *ecx,
        edx: *edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use demand_memory::to_usize;
    use test_support::host::skip;

    #[test]
    fn msrs_beyond_one_call_are_read_and_set() {
        let kvm = match demand_kvm::open_kvm() {
            Ok(kvm) => kvm,
            Err(error) => return skip(&error.to_string()),
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        const SYSENTER_EIP: u32 = 0x176;
        for count in [254, 255, 256, 257, 600] {
            let msrs: Vec<_> = (1..=count).map(|value| (SYSENTER_EIP, value)).collect();
            restore_msrs(&msrs, &On { cpu: 0, verb: RESTORE }, &vcpu).unwrap();
            let read = get_msrs(&vcpu, &vec![SYSENTER_EIP; to_usize(count)]).unwrap();
            assert_eq!(read, vec![(SYSENTER_EIP, count); to_usize(count)]);
        }
    }

    #[test]
    fn only_restore_errors_mention_a_damaged_snapshot() {
        let says = |verb| {
            let refused = Err::<(), _>(kvm_ioctls::Error::new(libc::EINVAL));
            On { cpu: 3, verb }.step("its registers", refused).unwrap_err().to_string()
        };
        let error = says(RESTORE);
        assert!(
            error.starts_with("cannot restore vCPU 3, its registers: Invalid argument"),
            "{error}"
        );
        assert!(error.contains("; the snapshot may be damaged"), "{error}");
        assert!(error.contains("the kernel's log"), "{error}");
        for verb in ["save", RESET] {
            let error = says(verb);
            assert!(!error.contains("damaged") && error.contains("the kernel's log"), "{error}");
        }
    }
}
