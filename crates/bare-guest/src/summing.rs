// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that sum their memory, and the images of that memory: a missing page that a guest reads
//! too early changes the sum. They run in [`Mode::Protected`](crate::Mode::Protected).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bindings::kvm_regs;

use crate::assembler::code_asm::{al, dword_ptr, eax, ebx, ecx, edx, esi, word_ptr};
use crate::assembler::{IcedError, assemble};
use crate::start_at;

/// The port to which a guest writes a sum, as 32 bits.
pub const PORT_SUM: u16 = 0x90;
/// The port to which a guest writes to kick its disk.
pub const PORT_KICK: u16 = 0x94;
/// The port to which a guest writes while it waits for its disk.
pub const PORT_WAIT: u16 = 0x98;

/// Bytes reserved for code, which lies in the last page of memory.
const CODE_BYTES: u64 = 4096;

/// Returns the guest physical address of the first instruction, in memory of `size` bytes.
fn entry(size: u64) -> u64 {
    size - CODE_BYTES
}

/// Distance in bytes and in words between the 32-bit words that a guest sums: it reads each page in
/// many places, and still finishes soon under a KVM that emulates every instruction.
const STRIDE: u64 = 4 * WORDS as u64;
const WORDS: usize = 16;

/// Writes an image of memory of `size` bytes, with a guest that sums words of all of it, from the
/// last page down, and writes the sum so far to [`PORT_SUM`] halfway and at the end.
///
/// # Errors
///
/// The error of the failed system call.
pub fn write_walker(image: &Path, size: u64) -> io::Result<()> {
    let words = word(size / 2 / STRIDE);
    write_image(image, size, &|entry| {
        assemble(32, entry, |asm| {
            let (mut half, mut next) = (asm.create_label(), asm.create_label());
            asm.mov(esi, word(size))?;
            asm.xor(ebx, ebx)?;
            asm.mov(edx, 2u32)?;
            asm.set_label(&mut half)?;
            asm.mov(ecx, words)?;
            asm.set_label(&mut next)?;
            asm.sub(esi, word(STRIDE))?;
            asm.add(ebx, dword_ptr(esi))?;
            asm.dec(ecx)?;
            asm.jne(next)?;
            asm.mov(eax, ebx)?;
            asm.out(u32::from(PORT_SUM), eax)?;
            asm.dec(edx)?;
            asm.jne(half)?;
            asm.hlt()
        })
    })
}

/// The memory and the work of a guest that drives a disk.
#[derive(Clone, Debug)]
pub struct Driver {
    /// Size of its memory, in bytes.
    pub size: u64,
    /// Address of the `idx` field of the queue's available ring.
    pub available: u64,
    /// Address of the `idx` field of the queue's used ring.
    pub used: u64,
    /// Number of requests, which are laid out already.
    pub requests: u16,
    /// The range that it sums at the end: address and length in bytes.
    pub data: (u64, u64),
}

/// Writes an image of memory, with a guest that makes the requests of a disk available one by one,
/// kicks and waits for each, and then sums words of its data and writes the sum to [`PORT_SUM`].
///
/// # Errors
///
/// The error of the failed system call.
pub fn write_driver(image: &Path, driver: &Driver) -> io::Result<()> {
    let (available, used, (data, len)) = (driver.available, driver.used, driver.data);
    write_image(image, driver.size, &|entry| {
        assemble(32, entry, |asm| {
            for number in 1..=u32::from(driver.requests) {
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
            asm.mov(esi, word(data))?;
            asm.mov(ecx, word(len / STRIDE))?;
            asm.xor(ebx, ebx)?;
            asm.set_label(&mut next)?;
            asm.add(ebx, dword_ptr(esi))?;
            asm.add(esi, word(STRIDE))?;
            asm.dec(ecx)?;
            asm.jne(next)?;
            asm.mov(eax, ebx)?;
            asm.out(u32::from(PORT_SUM), eax)?;
            asm.hlt()
        })
    })
}

/// Returns a number as an operand of 32-bit code.
fn word(number: u64) -> u32 {
    u32::try_from(number).expect("these guests have less than 4 GiB of memory")
}

/// Writes distinct words to the file `image`, and in the last page the code for that address.
fn write_image(
    image: &Path,
    size: u64,
    code: &dyn Fn(u64) -> Result<Vec<u8>, IcedError>,
) -> io::Result<()> {
    let code = code(entry(size)).map_err(io::Error::other)?;
    assert!(code.len() as u64 <= CODE_BYTES, "the code fits into its page");
    const CHUNK: usize = 1 << 20;
    let file = File::create(image)?;
    file.set_len(size)?;
    for start in (0..size).step_by(CHUNK) {
        let words = word(start / 4)..word((start + CHUNK as u64).min(size) / 4);
        let bytes: Vec<_> = words.flat_map(|word| word_of(word).to_le_bytes()).collect();
        file.write_all_at(&bytes, start)?;
    }
    file.write_all_at(&code, entry(size))
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
    let words = bytes.as_chunks::<4>().0.iter().step_by(WORDS);
    let words = words.map(|word| u32::from_le_bytes(*word));
    Ok(words.fold(0, u32::wrapping_add))
}

/// Checks the sum that a guest has written for a range of its memory.
///
/// # Errors
///
/// The error of the failed read, or one that gives both sums.
pub fn check(image: &Path, range: Range<u64>, seen: u32) -> io::Result<()> {
    let mut file = File::open(image)?;
    file.seek(SeekFrom::Start(range.start))?;
    let expected = sum(file.take(range.end - range.start))?;
    if seen == expected {
        return Ok(());
    }
    Err(io::Error::other(format!("the guest's sum is {seen:#x}, the image's {expected:#x}")))
}

/// Returns the registers with which the guests start, in memory of `size` bytes.
pub fn start(size: u64) -> kvm_regs {
    start_at(entry(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_different_ranges_differ() {
        let image = tempfile::NamedTempFile::new().unwrap();
        write_walker(image.path(), 1 << 20).unwrap();
        let sum_of = |from: u64| {
            let mut bytes = vec![0; 1 << 18];
            image.as_file().read_exact_at(&mut bytes, from).unwrap();
            sum(&bytes[..]).unwrap()
        };
        assert_ne!(sum_of(0), sum_of(1 << 18));
        assert_eq!(sum(File::open(image.path()).unwrap()).unwrap(), {
            (0..4).fold(0, |all: u32, part| all.wrapping_add(sum_of(part << 18)))
        });
    }
}
