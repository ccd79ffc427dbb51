// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guests of the examples, each a few instructions long, and their memory images. Nothing here
//! concerns demand paging.
//!
//! The guests run in 32-bit protected mode without paging: a guest's addresses are physical.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, eax, ebx, ecx, edx, esi, word_ptr};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// The port to which a guest writes a sum, as 32 bits.
pub const PORT_SUM: u16 = 0x90;
/// The port to which a guest writes to kick its disk.
pub const PORT_KICK: u16 = 0x94;
/// The port to which a guest writes while it waits for its disk.
pub const PORT_WAIT: u16 = 0x98;

/// Bytes reserved for code, which lies in the last page of memory.
const CODE_BYTES: u64 = 4096;

/// Returns the guest physical address of the first instruction, in memory of `size` bytes.
pub fn entry(size: u64) -> u64 {
    size - CODE_BYTES
}

/// Distance in bytes between the 32-bit words that a guest sums: it reads each page in many places,
/// and still finishes soon under a KVM that emulates every instruction.
const STRIDE: u64 = 64;

/// Assembles a guest that sums words of all its memory, from the last page down, and writes the sum
/// so far to [`PORT_SUM`] halfway and at the end.
///
/// # Errors
///
/// Only if the code in this function is wrong.
pub fn walker(size: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(32)?;
    let (mut half, mut next) = (asm.create_label(), asm.create_label());
    asm.mov(esi, size as u32)?;
    asm.xor(ebx, ebx)?;
    asm.mov(edx, 2u32)?;
    asm.set_label(&mut half)?;
    asm.mov(ecx, (size / 2 / STRIDE) as u32)?;
    asm.set_label(&mut next)?;
    asm.sub(esi, STRIDE as u32)?;
    asm.add(ebx, dword_ptr(esi))?;
    asm.dec(ecx)?;
    asm.jne(next)?;
    asm.mov(eax, ebx)?;
    asm.out(u32::from(PORT_SUM), eax)?;
    asm.dec(edx)?;
    asm.jne(half)?;
    asm.hlt()?;
    asm.assemble(entry(size))
}

/// Assembles a guest that makes `requests` requests of a disk available one by one, kicks and waits
/// for each, and then sums words of the `len` bytes at `data` and writes the sum to [`PORT_SUM`].
///
/// `available` and `used` are the addresses of the `idx` fields of the queue's rings.
///
/// # Errors
///
/// Only if the code in this function is wrong.
pub fn driver(
    size: u64,
    (available, used): (u64, u64),
    requests: u16,
    (data, len): (u64, u64),
) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(32)?;
    for number in 1..=u32::from(requests) {
        let (mut wait, mut done) = (asm.create_label(), asm.create_label());
        // x86 preserves the order of stores, and of loads: no barrier is needed.
        asm.mov(word_ptr(available), number)?;
        asm.out(u32::from(PORT_KICK), al)?;
        asm.set_label(&mut wait)?;
        asm.cmp(word_ptr(used), number)?;
        asm.je(done)?;
        asm.out(u32::from(PORT_WAIT), al)?;
        asm.jmp(wait)?;
        asm.set_label(&mut done)?;
    }
    let mut next = asm.create_label();
    asm.mov(esi, data as u32)?;
    asm.mov(ecx, (len / STRIDE) as u32)?;
    asm.xor(ebx, ebx)?;
    asm.set_label(&mut next)?;
    asm.add(ebx, dword_ptr(esi))?;
    asm.add(esi, STRIDE as u32)?;
    asm.dec(ecx)?;
    asm.jne(next)?;
    asm.mov(eax, ebx)?;
    asm.out(u32::from(PORT_SUM), eax)?;
    asm.hlt()?;
    asm.assemble(entry(size))
}

/// Fills `file` with an image of memory of `size` bytes: distinct words, and the code in the last
/// page.
///
/// # Errors
///
/// The error of the failed system call.
pub fn write_image(file: &File, size: u64, code: &[u8]) -> io::Result<()> {
    assert!(code.len() as u64 <= CODE_BYTES, "the code fits into its page");
    const CHUNK: u64 = 1 << 20;
    file.set_len(size)?;
    for start in (0..size).step_by(CHUNK as usize) {
        let words = (start / 4..(start + CHUNK).min(size) / 4).map(|word| word as u32);
        let bytes: Vec<_> = words.flat_map(|word| word_of(word).to_le_bytes()).collect();
        file.write_all_at(&bytes, start)?;
    }
    file.write_all_at(code, entry(size))
}

/// Returns word `number` of the image: mixed, so that different ranges of memory have different
/// sums.
fn word_of(number: u32) -> u32 {
    let mixed = number.wrapping_mul(0x9e37_79b1);
    (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b)
}

/// Returns the sum, modulo 2^32, of the words of `image` that a guest sums.
///
/// # Errors
///
/// The error of the failed read.
pub fn sum(mut image: impl Read) -> io::Result<u32> {
    let mut bytes = Vec::new();
    image.read_to_end(&mut bytes)?;
    let words = bytes.as_chunks::<4>().0.iter().step_by(STRIDE as usize / 4);
    let words = words.map(|word| u32::from_le_bytes(*word));
    Ok(words.fold(0, u32::wrapping_add))
}

/// Returns the system registers with which the guests start.
///
/// # Errors
///
/// KVM's error.
pub fn sregs(vcpu: &VcpuFd) -> Result<kvm_sregs, kvm_ioctls::Error> {
    let flat = |type_| kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr0 = 0x11; // PE, ET
    sregs.cs = flat(0xb);
    (sregs.ds, sregs.es, sregs.ss) = (flat(3), flat(3), flat(3));
    Ok(sregs)
}

/// Returns the registers with which the guests start, in memory of `size` bytes.
pub fn regs(size: u64) -> kvm_regs {
    kvm_regs { rip: entry(size), rflags: 2, ..Default::default() }
}
