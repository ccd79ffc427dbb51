// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of small guests.

use super::*;
use bare_guest::PROTECTED_GDT;
use bare_guest::assembler::code_asm::{
    al, byte_ptr, dword_ptr, dx, eax, ebp, ebx, ecx, edi, edx, esi,
};
use bare_guest::assembler::{IcedError, Programs};

/// Guest physical address of the code.
pub const CODE: u64 = 0x1000;
/// The port that reports a word that differs from the image's.
pub const WRONG: u8 = 0x10;
/// The port that reports that a guest is done.
pub const DONE: u16 = 0x11;

/// A guest's program.
#[derive(Clone, Copy)]
pub enum Program {
    /// Copies `count` pages from `first` on, `stride` pages apart, to its part of OUT, beginning at
    /// page `out`.
    Copy { out: u64 },
    /// Writes `value`, `value + 1`, ... to byte 16 of the pages.
    Write { value: u32 },
    /// Reads every word of the pages and compares it with the image's (without holes).
    Check,
    /// Loops for ever.
    Spin,
}

/// The pages that a program works on.
#[derive(Clone, Copy)]
pub struct Pages {
    pub first: u64,
    pub count: u64,
    pub stride: i64,
}

impl Pages {
    pub fn run(first: u64, count: u64) -> Self {
        Pages { first, count, stride: 1 }
    }

    pub fn iter(self) -> impl Iterator<Item = u64> {
        (0..self.count as i64).map(move |index| (self.first as i64 + index * self.stride) as u64)
    }
}

/// The programs' code and entry points.
pub struct Entries {
    pub code: Vec<u8>,
    pub copy: u64,
    pub write: u64,
    pub check: u64,
    pub spin: u64,
    /// Writes ecx bytes from esi on to the port in edx, with an instruction that KVM emulates.
    pub outs: u64,
    /// Reads ecx bytes from the port in edx to edi.
    pub ins: u64,
    /// Copies ecx bytes from esi to edi, one at a time.
    pub movs: u64,
    /// Writes edx:eax to MSR ecx, reads it back and writes it to [`PORT`], low word first. Then, if
    /// ebx is not 0, reads the byte at ebx and enables interrupts. Finally halts.
    pub wrmsr: u64,
    /// Writes eax to the port in edx.
    pub port_out: u64,
    /// Reads eax from the port in edx.
    pub port_in: u64,
    /// Writes eax to the memory or device at edi.
    pub store: u64,
    /// Reads eax from the memory or device at esi.
    pub load: u64,
    /// Reads the byte at ebx, enables interrupts and spins.
    pub touch: u64,
    /// The interrupt handler: writes the byte at ebx to [`PORT`], ends the interrupt, and writes to
    /// the port [`DONE`].
    pub interrupt: u64,
}

/// The local APIC's register that ends an interrupt.
const APIC_EOI: u64 = 0xfee0_00b0;
/// Bytes of the code page for programs; tables follow.
const CODE_BYTES: usize = 0x800;
/// Address of the segment table.
pub const GDT: u64 = CODE + CODE_BYTES as u64;
/// Offset of the last byte of that table.
pub const GDT_LIMIT: u16 = PROTECTED_GDT.len() as u16 * 8 - 1;
/// Address of the gate of the only interrupt.
const GATE: u64 = GDT + 0x100;
/// Number of that interrupt.
pub const VECTOR: u8 = 0x40;
/// Address of the table that contains the gate.
pub const IDT: u64 = GATE - VECTOR as u64 * 8;
/// Offset of the last byte of that table.
pub const IDT_LIMIT: u16 = VECTOR as u16 * 8 + 7;

/// Assembles the programs, one after another. Those of [`Program`] take the address of the first
/// page in esi, the number of pages in ebx, and the distance from one page to the next in edx, in
/// bytes.
pub fn assemble() -> Result<Entries, IcedError> {
    let mut programs = Programs::new(32, CODE);
    let copy = programs.add(|asm| {
        let mut next = asm.create_label();
        asm.cld()?;
        asm.set_label(&mut next)?;
        asm.mov(ebp, esi)?;
        asm.mov(ecx, 1024u32)?;
        asm.rep().movsd()?;
        asm.lea(esi, ebp + edx)?;
        asm.dec(ebx)?;
        asm.jne(next)?;
        asm.hlt()
    })?;
    let write = programs.add(|asm| {
        let mut next = asm.create_label();
        asm.set_label(&mut next)?;
        asm.mov(dword_ptr(esi + 16), eax)?;
        asm.inc(eax)?;
        asm.add(esi, edx)?;
        asm.dec(ebx)?;
        asm.jne(next)?;
        asm.hlt()
    })?;
    let check = programs.add(|asm| {
        let (mut next, mut within, mut right) =
            (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut next)?;
        asm.mov(ebp, esi)?;
        asm.mov(ecx, 1024u32)?;
        asm.set_label(&mut within)?;
        asm.mov(eax, dword_ptr(esi))?;
        asm.xor(eax, MIX)?;
        asm.cmp(eax, esi)?;
        asm.je(right)?;
        asm.out(u32::from(WRONG), al)?;
        asm.set_label(&mut right)?;
        asm.add(esi, 4)?;
        asm.dec(ecx)?;
        asm.jne(within)?;
        asm.lea(esi, ebp + edx)?;
        asm.dec(ebx)?;
        asm.jne(next)?;
        asm.hlt()
    })?;
    let spin = programs.add(|asm| {
        let mut here = asm.create_label();
        asm.set_label(&mut here)?;
        asm.jmp(here)
    })?;
    let outs = programs.add(|asm| {
        asm.rep().outsb()?;
        asm.hlt()
    })?;
    let ins = programs.add(|asm| {
        asm.rep().insb()?;
        asm.hlt()
    })?;
    let movs = programs.add(|asm| {
        asm.rep().movsb()?;
        asm.hlt()
    })?;
    let wrmsr = programs.add(|asm| {
        asm.wrmsr()?;
        asm.rdmsr()?;
        asm.out(u32::from(PORT), eax)?;
        asm.mov(eax, edx)?;
        asm.out(u32::from(PORT), eax)?;
        let mut done = asm.create_label();
        asm.test(ebx, ebx)?;
        asm.je(done)?;
        asm.mov(al, byte_ptr(ebx))?;
        asm.push(eax)?;
        asm.sti()?;
        asm.set_label(&mut done)?;
        asm.hlt()?;
        asm.jmp(done)
    })?;
    let port_out = programs.add(|asm| {
        asm.out(dx, eax)?;
        asm.hlt()
    })?;
    let port_in = programs.add(|asm| {
        asm.in_(eax, dx)?;
        asm.hlt()
    })?;
    let store = programs.add(|asm| {
        asm.mov(dword_ptr(edi), eax)?;
        asm.hlt()
    })?;
    let load = programs.add(|asm| {
        asm.mov(eax, dword_ptr(esi))?;
        asm.hlt()
    })?;
    let touch = programs.add(|asm| {
        let mut here = asm.create_label();
        asm.mov(al, byte_ptr(ebx))?;
        asm.push(eax)?;
        asm.sti()?;
        asm.set_label(&mut here)?;
        asm.jmp(here)
    })?;
    let interrupt = programs.add(|asm| {
        asm.mov(al, byte_ptr(ebx))?;
        asm.out(u32::from(PORT), al)?;
        asm.mov(dword_ptr(APIC_EOI), 0)?;
        asm.out(u32::from(DONE), al)?;
        asm.iretd()
    })?;
    let mut code = programs.into_code();
    assert!(code.len() <= CODE_BYTES);
    code.resize(PAGE_SIZE as usize, 0);
    let mut table = |address: u64, entry: u64| {
        let at = (address - CODE) as usize;
        code[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    for (at, descriptor) in (GDT..).step_by(8).zip(PROTECTED_GDT) {
        table(at, descriptor);
    }
    table(GATE, (interrupt & 0xffff_0000) << 32 | 0x8e00 << 32 | 8 << 16 | interrupt & 0xffff);
    Ok(Entries {
        code,
        copy,
        write,
        check,
        spin,
        outs,
        ins,
        movs,
        wrmsr,
        port_out,
        port_in,
        store,
        load,
        touch,
        interrupt,
    })
}
