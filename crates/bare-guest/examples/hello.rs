// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A whole VM whose guest writes a text to a port.

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bare_guest::assembler::Programs;
use bare_guest::assembler::code_asm::{ecx, edx, esi};
use bare_guest::{Mode, cpuid, start_at};
use demand_kvm::{PlainSlot, open_kvm};
use demand_memory::Mapping;
use kvm_ioctls::VcpuExit;
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
/// Guest physical address of the only page of memory.
const CODE: u64 = 0x1000;
const PORT: u16 = 0x90;
const TEXT: &str = "hello from a bare guest";

fn main() -> Result<(), Box<dyn Error>> {
    // The text, and behind it a program that writes it.
    let mut page = TEXT.as_bytes().to_vec();
    let mut programs = Programs::new(32, CODE + page.len() as u64);
    let entry = programs.add(|asm| {
        asm.mov(esi, u32::try_from(CODE).expect("32 bits"))?;
        asm.mov(ecx, u32::try_from(TEXT.len()).expect("short"))?;
        asm.mov(edx, u32::from(PORT))?;
        asm.rep().outsb()?;
        asm.hlt()
    })?;
    page.extend(programs.into_code());

    // Memory is the caller's; here, a file.
    let file = tempfile::tempfile()?;
    file.set_len(PAGE)?;
    file.write_all_at(&page, 0)?;

    let kvm = open_kvm()?;
    let vm = Arc::new(kvm.create_vm()?);
    let mapping = Arc::new(Mapping::shared(&file, PAGE)?);
    let _slot = PlainSlot::new(vm.clone(), 0, GuestAddress(CODE), mapping)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&cpuid(&kvm, 0)?)?;
    Mode::Protected.set(&vcpu)?;
    vcpu.set_regs(&start_at(entry))?;

    let mut written = Vec::new();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(PORT, data) => written.extend_from_slice(data),
            VcpuExit::Hlt => break,
            exit => return Err(format!("unexpected exit {exit:?}").into()),
        }
    }
    println!("{}", String::from_utf8(written)?);
    Ok(())
}
