// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of small guests.

use super::*;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, dword_ptr, dx, eax, ebp, ebx, ecx, edi, edx, esi,
};

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
/// Address of the segment table, which has one segment, at selector 8.
pub const GDT: u64 = CODE + CODE_BYTES as u64;
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
pub fn assemble() -> Entries {
    let mut code = Vec::new();
    let mut program = |build: &dyn Fn(&mut CodeAssembler)| {
        let start = CODE + code.len() as u64;
        let mut asm = CodeAssembler::new(32).unwrap();
        build(&mut asm);
        code.extend(asm.assemble(start).unwrap());
        start
    };
    let copy = program(&|asm| {
        let mut next = asm.create_label();
        asm.cld().unwrap();
        asm.set_label(&mut next).unwrap();
        asm.mov(ebp, esi).unwrap();
        asm.mov(ecx, 1024u32).unwrap();
        asm.rep().movsd().unwrap();
        asm.lea(esi, ebp + edx).unwrap();
        asm.dec(ebx).unwrap();
        asm.jne(next).unwrap();
        asm.hlt().unwrap();
    });
    let write = program(&|asm| {
        let mut next = asm.create_label();
        asm.set_label(&mut next).unwrap();
        asm.mov(dword_ptr(esi + 16), eax).unwrap();
        asm.inc(eax).unwrap();
        asm.add(esi, edx).unwrap();
        asm.dec(ebx).unwrap();
        asm.jne(next).unwrap();
        asm.hlt().unwrap();
    });
    let check = program(&|asm| {
        let (mut next, mut within, mut right) =
            (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut next).unwrap();
        asm.mov(ebp, esi).unwrap();
        asm.mov(ecx, 1024u32).unwrap();
        asm.set_label(&mut within).unwrap();
        asm.mov(eax, dword_ptr(esi)).unwrap();
        asm.xor(eax, MIX).unwrap();
        asm.cmp(eax, esi).unwrap();
        asm.je(right).unwrap();
        asm.out(u32::from(WRONG), al).unwrap();
        asm.set_label(&mut right).unwrap();
        asm.add(esi, 4).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(within).unwrap();
        asm.lea(esi, ebp + edx).unwrap();
        asm.dec(ebx).unwrap();
        asm.jne(next).unwrap();
        asm.hlt().unwrap();
    });
    let spin = program(&|asm| {
        let mut here = asm.create_label();
        asm.set_label(&mut here).unwrap();
        asm.jmp(here).unwrap();
    });
    let outs = program(&|asm| {
        asm.rep().outsb().unwrap();
        asm.hlt().unwrap();
    });
    let ins = program(&|asm| {
        asm.rep().insb().unwrap();
        asm.hlt().unwrap();
    });
    let movs = program(&|asm| {
        asm.rep().movsb().unwrap();
        asm.hlt().unwrap();
    });
    let wrmsr = program(&|asm| {
        asm.wrmsr().unwrap();
        asm.rdmsr().unwrap();
        asm.out(u32::from(PORT), eax).unwrap();
        asm.mov(eax, edx).unwrap();
        asm.out(u32::from(PORT), eax).unwrap();
        let mut done = asm.create_label();
        asm.test(ebx, ebx).unwrap();
        asm.je(done).unwrap();
        asm.mov(al, byte_ptr(ebx)).unwrap();
        asm.push(eax).unwrap();
        asm.sti().unwrap();
        asm.set_label(&mut done).unwrap();
        asm.hlt().unwrap();
        asm.jmp(done).unwrap();
    });
    let port_out = program(&|asm| {
        asm.out(dx, eax).unwrap();
        asm.hlt().unwrap();
    });
    let port_in = program(&|asm| {
        asm.in_(eax, dx).unwrap();
        asm.hlt().unwrap();
    });
    let store = program(&|asm| {
        asm.mov(dword_ptr(edi), eax).unwrap();
        asm.hlt().unwrap();
    });
    let load = program(&|asm| {
        asm.mov(eax, dword_ptr(esi)).unwrap();
        asm.hlt().unwrap();
    });
    let touch = program(&|asm| {
        let mut here = asm.create_label();
        asm.mov(al, byte_ptr(ebx)).unwrap();
        asm.push(eax).unwrap();
        asm.sti().unwrap();
        asm.set_label(&mut here).unwrap();
        asm.jmp(here).unwrap();
    });
    let interrupt = program(&|asm| {
        asm.mov(al, byte_ptr(ebx)).unwrap();
        asm.out(u32::from(PORT), al).unwrap();
        asm.mov(dword_ptr(APIC_EOI), 0).unwrap();
        asm.out(u32::from(DONE), al).unwrap();
        asm.iretd().unwrap();
    });
    assert!(code.len() <= CODE_BYTES);
    code.resize(PAGE_SIZE as usize, 0);
    let mut table = |address: u64, entry: u64| {
        let at = (address - CODE) as usize;
        code[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    table(GDT + 8, 0x00cf_9b00_0000_ffff); // Flat code, 32 bits.
    table(GATE, (interrupt & 0xffff_0000) << 32 | 0x8e00 << 32 | 8 << 16 | interrupt & 0xffff);
    Entries {
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
    }
}
