// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The measured guest, which only touches pages in the order of a table.

use std::sync::Arc;

use demand_kvm::{PlainSlot, SlotError};
use demand_memory::{Mapping, PAGE_SIZE};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, dword_ptr, eax, ebx, ecx, qword_ptr, rax, rbp, rcx, rdi, rsi,
};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use test_guest::guest_layout::guest_cpuid;
use vm_memory::GuestAddress;

use super::Access;
use crate::error::Error;

/// Start of the demand-paged memory. The guest's code and tables lie below.
pub const MEMORY_ADDRESS: u64 = 4 << 30;

/// End of the range that the guest's page tables can map: one PDPT, whose entries cover 1 GiB each.
pub const ADDRESS_END: u64 = 512 << 30;

/// The port to which the guest writes when its code and tables are mapped.
pub const PORT_READY: u16 = 0x20;

/// Memslot of the control region.
const CONTROL_SLOT: u32 = 1;

// The control region at guest address 0: code, page tables (for each GiB a table of 2 MiB pages,
// because not every KVM supports 1 GiB pages), then each vCPU's table of addresses.
const CODE: u64 = 0;
const PML4: u64 = PAGE_SIZE;
const PDPT: u64 = 2 * PAGE_SIZE;
const PDS: u64 = 3 * PAGE_SIZE;

/// The guest's code, page tables and tables of addresses.
pub struct Control {
    slot: PlainSlot,
    /// Start of the tables of addresses.
    tables: u64,
    /// Number of addresses in each vCPU's table.
    entries: u64,
}

/// Assembles the guest's code. Input: rsi is the table's address, rcx and rbp its number of
/// entries. Output, for reads: ebx, which depends on each word read and on their order ([`mix`]).
fn assemble(access: Access) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut warm, mut next) = (asm.create_label(), asm.create_label());
    // The guest reads its table once first, so that the measurement does not include faults on it.
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
    asm.hlt()?;
    asm.assemble(CODE)
}

/// Returns the guest's hash after it has read another word.
pub fn mix(hash: u32, word: u32) -> u32 {
    hash.rotate_left(5).wrapping_add(word)
}

/// Returns the word that the guest writes at entry `index` of `entries`.
pub fn written(index: usize, entries: usize) -> u32 {
    (entries - index) as u32
}

impl Control {
    /// Creates the control region. `tables` holds, for each vCPU, the addresses that it touches.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub fn new(vm: &Arc<VmFd>, access: Access, tables: &[Vec<u64>]) -> Result<Self, Error> {
        let entries = tables.first().map_or(0, Vec::len) as u64;
        // Map only touched memory, so that this work does not depend on the size of memory.
        let last = tables.iter().flatten().max().copied().unwrap_or(0);
        assert!(last < ADDRESS_END);
        let gigabytes = (last >> 30) + 1;
        let tables_at = PDS + gigabytes * PAGE_SIZE;
        let len = (tables_at + tables.len() as u64 * entries * 8).next_multiple_of(PAGE_SIZE);
        let mapping = Mapping::anonymous(len)
            .map_err(|error| Error::host(format!("cannot map the guest's tables: {error}")))?;
        let code = assemble(access)
            .map_err(|error| Error::failed(format!("cannot assemble the guest: {error}")))?;
        let put = |offset: u64, bytes: &[u8]| {
            assert!(offset + bytes.len() as u64 <= len, "it was made large enough");
            // SAFETY: the assertion shows that the bytes lie in the mapping, and no other code has
            // its address yet.
            unsafe {
                let to = mapping.at(offset).as_ptr();
                to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
        };
        put(CODE, &code);
        // Present, writable, accessed; pages also large and dirty, so that the guest's page walk
        // writes nothing.
        put(PML4, &(PDPT | 0x23).to_le_bytes());
        for gigabyte in 0..gigabytes {
            let table = PDS + gigabyte * PAGE_SIZE;
            put(PDPT + gigabyte * 8, &(table | 0x23).to_le_bytes());
            let pages = (0..512).map(|page| gigabyte << 30 | page << 21 | 0xe3);
            put(table, &pages.flat_map(|entry: u64| entry.to_le_bytes()).collect::<Vec<_>>());
        }
        for (cpu, table) in tables.iter().enumerate() {
            let bytes: Vec<u8> = table.iter().flat_map(|address| address.to_le_bytes()).collect();
            put(tables_at + cpu as u64 * entries * 8, &bytes);
        }
        let slot =
            PlainSlot::new(vm.clone(), CONTROL_SLOT, GuestAddress(0), Arc::new(mapping), false)
                .map_err(|error: SlotError| Error::host(error))?;
        Ok(Control { slot, tables: tables_at, entries })
    }

    /// Creates vCPU `cpu` at the guest's first instruction, in long mode with flat segments.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub fn vcpu(&self, kvm: &Kvm, vm: &VmFd, cpu: u32) -> Result<VcpuFd, Error> {
        self.set_up(kvm, vm, cpu).map_err(|error| {
            Error::host(format!("cannot create vCPU {cpu}: {error}; ask for fewer with --cpus"))
        })
    }

    fn set_up(&self, kvm: &Kvm, vm: &VmFd, cpu: u32) -> Result<VcpuFd, kvm_ioctls::Error> {
        let vcpu = vm.create_vcpu(cpu.into())?;
        vcpu.set_cpuid2(&guest_cpuid(kvm, cpu as usize)?)?;
        let mut sregs = vcpu.get_sregs()?;
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        // Without an interrupt table, an unexpected exception ends in a shutdown exit.
        sregs.idt.limit = 0;
        sregs.cr3 = self.slot.start().0 + PML4;
        // PAE; LME and LMA; PE, ET, WP, PG.
        sregs.cr4 = 1 << 5;
        sregs.efer = 1 << 8 | 1 << 10;
        sregs.cr0 = 1 | 1 << 4 | 1 << 16 | 1 << 31;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs {
            rip: CODE,
            rsi: self.tables + u64::from(cpu) * self.entries * 8,
            rcx: self.entries,
            rbp: self.entries,
            rflags: 2,
            ..Default::default()
        })?;
        Ok(vcpu)
    }
}
