// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests in each mode on this host's KVM.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bare_guest::assembler::assemble;
use bare_guest::assembler::code_asm::{dword_ptr, eax, ebx};
use bare_guest::{LARGE_PAGE, Mode, PageTables, cpuid, start_at};
use demand_kvm::{PlainSlot, open_kvm};
use demand_memory::Mapping;
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use test_support::host::skip;
use vm_memory::GuestAddress;

const CODE: u64 = 0x1000;
const TABLES: u64 = 0x2000;
/// A word that real mode reaches only with a raised segment limit.
const AT: u64 = LARGE_PAGE + 0x124;
const WORD: u32 = 0x600d_cafe;
const PORT: u16 = 0x90;

/// Returns memory of two large pages, with the program, the tables and the word.
fn memory(bits: u32) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * LARGE_PAGE).unwrap();
    let code = assemble(bits, CODE, |asm| {
        asm.mov(eax, dword_ptr(ebx))?;
        asm.out(u32::from(PORT), eax)?;
        asm.hlt()
    });
    file.write_all_at(&code.unwrap(), CODE).unwrap();
    file.write_all_at(&WORD.to_le_bytes(), AT).unwrap();
    for (address, entry) in tables().entries() {
        file.write_all_at(&entry.to_le_bytes(), address).unwrap();
    }
    file
}

/// Returns tables that map the first page at 0 and the second at 1 GiB.
fn tables() -> PageTables {
    const GIB: u64 = 1 << 30;
    let mut tables = PageTables::new(TABLES);
    tables.map(0..LARGE_PAGE, 0);
    tables.map(GIB..GIB + LARGE_PAGE, LARGE_PAGE);
    tables
}

/// Returns the word that a guest in this mode reads at an address.
fn read(mode: Mode, bits: u32, address: u64) -> Option<u32> {
    let kvm = open_kvm().map_err(|error| skip(&error.to_string())).ok()?;
    let vm = Arc::new(kvm.create_vm().unwrap());
    let mapping = Arc::new(Mapping::shared(&memory(bits), 2 * LARGE_PAGE).unwrap());
    let _slot = PlainSlot::new(vm.clone(), 0, GuestAddress(0), mapping).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&cpuid(&kvm, 0).unwrap()).unwrap();
    mode.set(&vcpu).unwrap();
    vcpu.set_regs(&kvm_regs { rbx: address, ..start_at(CODE) }).unwrap();
    let word = match vcpu.run().unwrap() {
        VcpuExit::IoOut(PORT, data) => u32::from_le_bytes(data.try_into().unwrap()),
        exit => panic!("{exit:?}"),
    };
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Hlt)));
    Some(word)
}

#[test]
fn real_mode_reaches_high_memory() {
    if let Some(word) = read(Mode::Real, 16, AT) {
        assert_eq!(word, WORD);
    }
}

#[test]
fn protected_mode_addresses_are_physical() {
    if let Some(word) = read(Mode::Protected, 32, AT) {
        assert_eq!(word, WORD);
    }
}

#[test]
fn long_mode_uses_page_tables() {
    let mode = Mode::Long { page_tables: tables().root() };
    if let Some(word) = read(mode, 64, (1 << 30) + AT % LARGE_PAGE) {
        assert_eq!(word, WORD);
    }
}

#[test]
fn cpuid_names_the_vcpu() {
    let Ok(kvm) = open_kvm().map_err(|error| skip(&error.to_string())) else { return };
    let cpuid = cpuid(&kvm, 5).unwrap();
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 1).unwrap();
    assert_eq!(leaf.ebx >> 24, 5);
}
