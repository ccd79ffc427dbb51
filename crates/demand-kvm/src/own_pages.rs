// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest memory that KVM itself accesses because a register names it.
//!
//! Sources: `Documentation/virt/kvm/x86/msr.rst` for KVM's own MSRs; Microsoft's "Hypervisor
//! Top-Level Functional Specification", appendix on MSRs, for Hyper-V's; AMD's "Architecture
//! Programmer's Manual", volume 2, sections 5.2.4 (PDPTRs) and 10.2.3 (the state save area).

use demand_memory::PAGE_SIZE;
use kvm_bindings::{kvm_msr_entry, kvm_sregs};
use vm_memory::GuestAddress;

/// Memory that an MSR names.
struct Area {
    msr: u32,
    /// The bit that enables it; 0 if any address except 0 does.
    enable: u64,
    /// The bits of the MSR that hold the address.
    address: u64,
    /// Offset of the memory from that address, in bytes.
    offset: u64,
    /// Its length, in bytes.
    len: u64,
}

impl Area {
    const fn new(msr: u32, enable: u64, address: u64, len: u64) -> Self {
        Area { msr, enable, address, offset: 0, len }
    }

    /// A Hyper-V page: page number from bit 12 up, enabled by bit 0.
    const fn hyperv(msr: u32) -> Self {
        Area::new(msr, 1, !0xfff, PAGE_SIZE)
    }
}

/// KVM's own MSRs come first: those that a guest writes and [`MsrFilter`](crate::MsrFilter) traps.
const AREAS: [Area; 13] = [
    // Wall clock, old and new: `struct pvclock_wall_clock`, written when the MSR is written.
    Area::new(0x11, 0, !0, 12),
    Area::new(0x4b56_4d00, 0, !0, 12),
    // System time, old and new: `struct pvclock_vcpu_time_info`.
    Area::new(0x12, 1, !1, 32),
    Area::new(0x4b56_4d01, 1, !1, 32),
    // Asynchronous page faults: `struct kvm_vcpu_pv_apf_data`.
    Area::new(0x4b56_4d02, 1, !0x3f, 64),
    // Steal time: `struct kvm_steal_time`.
    Area::new(0x4b56_4d03, 1, !0x3f, 64),
    // End of interrupt: one word.
    Area::new(0x4b56_4d04, 1, !0x3, 4),
    // HV_X64_MSR_HYPERCALL, _REFERENCE_TSC, _VP_ASSIST_PAGE, _SIEFP and _SIMP.
    Area::hyperv(0x4000_0001),
    Area::hyperv(0x4000_0021),
    Area::hyperv(0x4000_0073),
    Area::hyperv(0x4000_0082),
    Area::hyperv(0x4000_0083),
    // MSR_IA32_SMBASE: a system management interrupt saves the processor's state there.
    Area { msr: 0x9e, enable: 0, address: 0xffff_ffff, offset: 0xfe00, len: 512 },
];

/// Number of [`AREAS`] that are KVM's own.
const OWN: usize = 7;

/// Returns the numbers of KVM's own MSRs that name memory.
pub(crate) fn own_msrs() -> impl Iterator<Item = u32> {
    AREAS[..OWN].iter().map(|area| area.msr)
}

/// Returns the memory that KVM touches once an MSR has this value: guest physical address and
/// length in bytes. `None` if the MSR names no memory.
pub(crate) fn named_by_msr(index: u32, data: u64) -> Option<(u64, u64)> {
    let area = AREAS.iter().find(|area| area.msr == index)?;
    let address = data & area.address;
    let on = if area.enable == 0 { address != 0 } else { data & area.enable != 0 };
    Some((address.checked_add(area.offset)?, area.len)).filter(|_| on)
}

/// Returns the memory from which KVM loads processor state when the system registers are set: the
/// four page-directory pointers, with PAE paging outside long mode.
fn named_by_sregs(sregs: &kvm_sregs) -> Option<(u64, u64)> {
    const PAGING: u64 = 1 << 31; // CR0.PG
    const PAE: u64 = 1 << 5; // CR4.PAE
    const LONG: u64 = 1 << 10; // EFER.LMA
    let pae = sregs.cr0 & PAGING != 0 && sregs.cr4 & PAE != 0 && sregs.efer & LONG == 0;
    pae.then_some((sregs.cr3 & 0xffff_ffe0, 32))
}

/// Returns the guest pages that KVM itself reads and writes once a vCPU has this state, so that
/// they can be fetched before it is set. `msrs` are the vCPU's MSRs, as `KVM_GET_MSRS` returned
/// them for the snapshot. `sregs` is the argument for `KVM_SET_SREGS`, if that will be called. The
/// result is a sorted list of page addresses without duplicates. It may contain pages outside
/// memory.
///
/// KVM ignores the missing bitmap for these accesses. If it wrote to a missing page, a later fetch
/// would overwrite the write with the image's bytes; if it read one, it might read zeros. So, for
/// each vCPU: call this; call [`FaultHandler::fetch_pages`](crate::FaultHandler::fetch_pages); then
/// call `KVM_SET_SREGS` and `KVM_SET_MSRS`. Never call those two on a thread that serves faults: if
/// the slot's mapping is armed with a userfaultfd, they wait for any page that was not fetched
/// before, and only a deadly signal ends that wait.
///
/// The pages are those of kvm-clock, asynchronous page faults, steal time, PV EOI and Hyper-V, the
/// state save area of system management mode, and the page-directory pointers of PAE paging. Memory
/// that a VMM names to KVM through other ioctls is in no register and so not included (Xen's shared
/// pages, `KVM_SET_VAPIC_ADDR`, nested state).
///
/// # Examples
///
/// ```
/// use demand_kvm::own_pages;
/// use kvm_bindings::kvm_msr_entry;
/// use vm_memory::GuestAddress;
///
/// // kvm-clock, enabled by bit 0, across two pages.
/// let clock = kvm_msr_entry { index: 0x4b56_4d01, data: 0x1ff0 | 1, ..Default::default() };
/// assert_eq!(own_pages(&[clock], None), [GuestAddress(0x1000), GuestAddress(0x2000)]);
/// ```
pub fn own_pages(msrs: &[kvm_msr_entry], sregs: Option<&kvm_sregs>) -> Vec<GuestAddress> {
    let by_msr = msrs.iter().filter_map(|msr| named_by_msr(msr.index, msr.data));
    let mut pages: Vec<_> = by_msr
        .chain(sregs.and_then(named_by_sregs))
        .flat_map(|(address, len)| {
            let last = address.saturating_add(len - 1);
            (address / PAGE_SIZE..=last / PAGE_SIZE).map(|page| GuestAddress(page * PAGE_SIZE))
        })
        .collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(index: u32, data: u64) -> Vec<u64> {
        let msr = kvm_msr_entry { index, data, ..Default::default() };
        own_pages(&[msr], None).into_iter().map(|page| page.0).collect()
    }

    #[test]
    fn each_register_names_its_pages() {
        for (index, data, expected) in [
            // Disabled.
            (0x4b56_4d01, 0x5000, &[][..]),
            (0x4b56_4d02, 0x5000, &[]),
            (0x4b56_4d03, 0x5000, &[]),
            (0x4b56_4d04, 0x5000, &[]),
            (0x4000_0021, 0x5000, &[]),
            (0x4b56_4d00, 0, &[]),
            // Enabled; the wall clock has no enable bit.
            (0x12, 0x5001, &[0x5000]),
            (0x4b56_4d00, 0x5008, &[0x5000]),
            (0x11, 0x5ff8, &[0x5000, 0x6000]),
            (0x4b56_4d01, 0x5fe1, &[0x5000]),
            (0x4b56_4d01, 0x5fe3, &[0x5000, 0x6000]),
            // Flag bits are not part of the address.
            (0x4b56_4d02, 0x5fc0 | 0xf, &[0x5000]),
            (0x4b56_4d03, 0x5fc0 | 1, &[0x5000]),
            (0x4b56_4d04, 0x5ffc | 1, &[0x5000]),
            (0x4000_0083, 0x5000 | 1, &[0x5000]),
            (0x9e, 0x3_0000, &[0x3_f000]),
            // Names no memory.
            (0x4b56_4d05, 0x5001, &[]),
            (0x10, 0x5001, &[]),
            // The end of the address space.
            (0x4b56_4d01, u64::MAX, &[0xffff_ffff_ffff_f000]),
        ] {
            assert_eq!(pages(index, data), expected, "{index:#x} {data:#x}");
        }
    }

    #[test]
    fn pages_are_listed_once_and_in_order() {
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let msrs = [msr(0x4b56_4d01, 0x9001), msr(0x4b56_4d03, 0x2041), msr(0x4b56_4d00, 0x9040)];
        let sregs =
            |cr0, cr4, efer| kvm_sregs { cr0, cr4, efer, cr3: 0x3fe7, ..Default::default() };
        let pages = |sregs: Option<kvm_sregs>| -> Vec<u64> {
            own_pages(&msrs, sregs.as_ref()).into_iter().map(|page| page.0).collect()
        };
        assert_eq!(pages(None), [0x2000, 0x9000]);
        assert_eq!(pages(Some(sregs(1 << 31, 1 << 5, 0))), [0x2000, 0x3000, 0x9000]);
        for other in [sregs(0, 1 << 5, 0), sregs(1 << 31, 0, 0), sregs(1 << 31, 1 << 5, 1 << 10)] {
            assert_eq!(pages(Some(other)), [0x2000, 0x9000]);
        }
    }

    #[test]
    fn a_guest_is_stopped_at_kvms_own() {
        let own: Vec<_> = own_msrs().collect();
        assert!(own.iter().all(|msr| matches!(msr, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4d04)));
        assert_eq!(own.len(), 7);
    }
}
