// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The modes of a vCPU, each with flat segments.

use kvm_bindings::{kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Selectors of the code and data segments, in protected and long mode.
const CODE: u16 = 8;
const DATA: u16 = 16;

/// Segment types: code that is executed and read, data that is read and written; both accessed.
const EXECUTE_READ: u8 = 11;
const READ_WRITE: u8 = 3;

// CR0, CR4 and EFER (Intel's "Software Developer's Manual", volume 3, sections 2.2.1 and 2.5).
const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The segment descriptors of [`Mode::Protected`], in the order of their selectors, for a guest
/// that loads segments, as a return from an interrupt does.
pub const PROTECTED_GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// A processor mode in which guest addresses are flat: all segments begin at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit code in the first 64 KiB. Data segments reach 4 GiB, with 32-bit addresses (prefix
    /// 0x67). Every processor starts in it.
    Real,
    /// 32-bit code without paging: addresses are guest physical, up to 4 GiB.
    Protected,
    /// 64-bit code.
    Long {
        /// Guest physical address of the level 4 page table, as of [`PageTables`](crate::PageTables).
        page_tables: u64,
    },
}

impl Mode {
    /// Changes special registers, as read from a new vCPU, to this mode.
    pub fn apply(self, sregs: &mut kvm_sregs) {
        match self {
            Mode::Real => {
                (sregs.cs.base, sregs.cs.selector) = (0, 0);
                for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
                    (segment.base, segment.limit, segment.g) = (0, u32::MAX, 1);
                }
            }
            Mode::Protected => {
                sregs.cr0 = CR0_PE | CR0_ET;
                set_segments(sregs, kvm_segment { db: 1, ..flat(CODE, EXECUTE_READ) });
            }
            Mode::Long { page_tables } => {
                set_segments(sregs, kvm_segment { l: 1, ..flat(CODE, EXECUTE_READ) });
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
                // Without an interrupt table, an exception ends in a shutdown exit.
                sregs.idt.limit = 0;
            }
        }
    }

    /// Puts a vCPU into this mode.
    ///
    /// # Errors
    ///
    /// KVM's error.
    pub fn set(self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        self.apply(&mut sregs);
        vcpu.set_sregs(&sregs)
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = kvm_segment { db: 1, ..flat(DATA, READ_WRITE) };
    }
}

/// Returns a present segment from 0 to 4 GiB.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, s: 1, g: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the fields of a descriptor (Intel's manual, volume 3, section 3.4.5).
    fn segment(selector: u16) -> kvm_segment {
        let descriptor = PROTECTED_GDT[usize::from(selector) / 8];
        let bit = |at: u32| u8::from(descriptor >> at & 1 == 1);
        assert_eq!(descriptor >> 16 & 0xff_ffff, 0, "base");
        assert_eq!((descriptor & 0xffff, descriptor >> 48 & 0xf), (0xffff, 0xf), "limit");
        kvm_segment {
            limit: u32::MAX,
            selector,
            type_: u8::try_from(descriptor >> 40 & 0xf).unwrap(),
            s: bit(44),
            present: bit(47),
            l: bit(53),
            db: bit(54),
            g: bit(55),
            ..Default::default()
        }
    }

    #[test]
    fn descriptors_are_those_of_protected_mode() {
        let mut sregs = kvm_sregs::default();
        Mode::Protected.apply(&mut sregs);
        assert_eq!(sregs.cs, segment(CODE));
        assert_eq!((sregs.ds, sregs.ss), (segment(DATA), segment(DATA)));
    }
}
