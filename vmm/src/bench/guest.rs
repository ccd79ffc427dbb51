// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The measured guest, which only touches pages in the order of a table.

use std::sync::Arc;

use bare_guest::{Mode, PageTables, cpuid, start_at};
use demand_kvm::{PlainSlot, hide_nested};
use demand_memory::{Mapping, PAGE_SIZE};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::GuestAddress;

use super::error::BenchError;
use super::options::Access;
use crate::vm::machine::MachineError;

/// Start of the demand-paged memory. The guest's code and tables lie below.
pub(super) const MEMORY_ADDRESS: u64 = 4 << 30;

/// End of the range that the guest's page tables can map: one PDPT, whose entries cover 1 GiB each.
pub(super) const ADDRESS_END: u64 = 512 << 30;

/// The port to which the guest writes when its code and tables are mapped.
pub(super) const PORT_READY: u16 = 0x20;

/// Memslot of the control region.
const CONTROL_SLOT: u32 = 1;

// The control region at guest address 0: code, page tables, then each vCPU's table of addresses.
const CODE: u64 = 0;
const PAGE_TABLES: u64 = PAGE_SIZE;

// The guest's code, as bytes, so that the VMM contains no assembler. Input: rsi is the table's
// address, rcx and rbp its number of entries.

/// Reads the table once, so that the measurement does not include faults on it, and reports that
/// the guest is ready.
#[rustfmt::skip]
const WARM_UP: [u8; 15] = [
    0x48, 0x8b, 0x44, 0xce, 0xf8, // warm: mov rax, [rsi + rcx * 8 - 8]
    0x48, 0xff, 0xc9,             // dec rcx
    0x75, 0xf6,                   // jne warm
    0xe6, 0x20,                   // out PORT_READY, al
    0x48, 0x89, 0xe9,             // mov rcx, rbp
];

/// Reads a word of each page. Output: ebx, which depends on each word and on their order ([`mix`]).
#[rustfmt::skip]
const READ: [u8; 20] = [
    0x48, 0x8b, 0x3e,             // next: mov rdi, [rsi]
    0x48, 0x83, 0xc6, 0x08,       // add rsi, 8
    0x8b, 0x07,                   // mov eax, [rdi]
    0xc1, 0xc3, 0x05,             // rol ebx, 5
    0x01, 0xc3,                   // add ebx, eax
    0x48, 0xff, 0xc9,             // dec rcx
    0x75, 0xed,                   // jne next
    0xf4,                         // hlt
];

/// Writes a word to each page ([`written`]).
#[rustfmt::skip]
const WRITE: [u8; 15] = [
    0x48, 0x8b, 0x3e,             // next: mov rdi, [rsi]
    0x48, 0x83, 0xc6, 0x08,       // add rsi, 8
    0x89, 0x0f,                   // mov [rdi], ecx
    0x48, 0xff, 0xc9,             // dec rcx
    0x75, 0xf2,                   // jne next
    0xf4,                         // hlt
];

fn code(access: Access) -> Vec<u8> {
    let touch = match access {
        Access::Read => &READ[..],
        Access::Write => &WRITE[..],
    };
    [&WARM_UP[..], touch].concat()
}

/// Returns the guest's hash after it has read another word.
pub(super) fn mix(hash: u32, word: u32) -> u32 {
    hash.rotate_left(5).wrapping_add(word)
}

/// Returns the word that the guest writes at entry `index` of `entries`: the number of those left.
/// They are fewer than 2^32 because memory is limited by [`ADDRESS_END`].
pub(super) fn written(index: usize, entries: usize) -> u32 {
    u32::try_from(entries - index).expect("a vCPU has fewer than 2^32 pages")
}

/// The guest's code, page tables and tables of addresses.
pub(super) struct Control {
    /// Keeps them in the guest.
    _slot: PlainSlot,
    /// Start of the tables of addresses.
    tables: u64,
    /// Number of addresses in each vCPU's table.
    entries: u64,
}

impl Control {
    /// Creates the control region. `tables` holds, for each vCPU, the addresses that it touches.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub(super) fn new(
        vm: &Arc<VmFd>,
        access: Access,
        tables: &[Vec<u64>],
    ) -> Result<Self, BenchError> {
        let entries = tables.first().map_or(0, Vec::len) as u64;
        // Map only touched memory, so that this work does not depend on the size of memory.
        let last = tables.iter().flatten().max().copied().unwrap_or(0);
        assert!(last < ADDRESS_END);
        let mut pages = PageTables::new(PAGE_TABLES);
        pages.map(0..(last + 1).next_multiple_of(1 << 30), 0);
        let tables_at = PAGE_TABLES + pages.size();
        let len = (tables_at + tables.len() as u64 * entries * 8).next_multiple_of(PAGE_SIZE);
        let mapping = Mapping::anonymous(len).map_err(|source| BenchError::Tables { source })?;
        let put = |offset: u64, bytes: &[u8]| {
            assert!(offset + bytes.len() as u64 <= len, "it was made large enough");
            // SAFETY: the assertion shows that the bytes lie in the mapping, and no other code has
            // its address yet.
            unsafe {
                let to = mapping.at(offset).as_ptr();
                to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
        };
        put(CODE, &code(access));
        for (address, entry) in pages.entries() {
            put(address, &entry.to_le_bytes());
        }
        for (at, address) in (tables_at..).step_by(8).zip(tables.iter().flatten()) {
            put(at, &address.to_le_bytes());
        }
        let slot = PlainSlot::new(vm.clone(), CONTROL_SLOT, GuestAddress(0), Arc::new(mapping))?;
        Ok(Control { _slot: slot, tables: tables_at, entries })
    }

    /// Creates vCPU `cpu` at the guest's first instruction, in long mode with flat segments.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub(super) fn vcpu(&self, kvm: &Kvm, vm: &VmFd, cpu: u32) -> Result<VcpuFd, MachineError> {
        let vcpu = self.set_up(kvm, vm, cpu);
        vcpu.map_err(|source| MachineError::CreateVcpu { cpu, source })
    }

    fn set_up(&self, kvm: &Kvm, vm: &VmFd, cpu: u32) -> Result<VcpuFd, kvm_ioctls::Error> {
        let vcpu = vm.create_vcpu(cpu.into())?;
        let mut cpuid = cpuid(kvm, cpu)?;
        hide_nested(&mut cpuid);
        vcpu.set_cpuid2(&cpuid)?;
        Mode::Long { page_tables: PAGE_TABLES }.set(&vcpu)?;
        vcpu.set_regs(&kvm_regs {
            rsi: self.tables + u64::from(cpu) * self.entries * 8,
            rcx: self.entries,
            rbp: self.entries,
            ..start_at(CODE)
        })?;
        Ok(vcpu)
    }
}

#[cfg(test)]
mod tests {
    use bare_guest::assembler::assemble;
    use bare_guest::assembler::code_asm::{
        al, dword_ptr, eax, ebx, ecx, qword_ptr, rax, rbp, rcx, rdi, rsi,
    };

    use super::*;

    #[test]
    fn code_is_what_its_comments_say() {
        for access in [Access::Read, Access::Write] {
            let assembled = assemble(64, CODE, |asm| {
                let (mut warm, mut next) = (asm.create_label(), asm.create_label());
                asm.set_label(&mut warm)?;
                asm.mov(rax, qword_ptr(rsi + rcx * 8 - 8))?;
                asm.dec(rcx)?;
                asm.jne(warm)?;
                asm.out(u32::from(PORT_READY), al)?;
                asm.mov(rcx, rbp)?;
                asm.set_label(&mut next)?;
                asm.mov(rdi, qword_ptr(rsi))?;
                asm.add(rsi, 8)?;
                match access {
                    Access::Read => {
                        asm.mov(eax, dword_ptr(rdi))?;
                        asm.rol(ebx, 5u32)?;
                        asm.add(ebx, eax)?;
                    }
                    Access::Write => asm.mov(dword_ptr(rdi), ecx)?,
                }
                asm.dec(rcx)?;
                asm.jne(next)?;
                asm.hlt()
            });
            assert_eq!(code(access), assembled.unwrap());
        }
    }
}
