// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernels of a few instructions, which any KVM can run.

use test_support::elf;

/// Guest address at which the kernels are loaded. Memory below 3 GiB has the same offset in a
/// snapshot's image.
pub const START: u64 = 0x100_0000;

/// Code that jumps to itself.
pub const LOOP: &[u8] = &[0xeb, 0xfe];

/// Code that writes "." to the serial port without end: `mov dx, 0x3f8; mov al, '.'; out dx, al;
/// jmp` to the `out`.
pub const PRINT: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd];

/// Returns an ELF image that could be loaded at 16 MiB, without information on how to boot it.
pub fn plain_elf() -> Vec<u8> {
    elf::without_entry(START)
}

/// Returns an ELF image with a PVH entry, at which `code` runs: 32-bit, with flat segments, no
/// paging and no interrupt table.
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    elf::with_pvh_entry(START, None, code)
}

/// Returns code that writes values to registers of the first virtio device repeatedly: offsets
/// below 0x80, values, and whether all four bytes are written or one. Every 256th time it writes
/// "." to the serial port.
pub fn register_writer(writes: &[(u8, u32, bool)]) -> Vec<u8> {
    let device = demand_vmm::arch::layout::DEVICES as u32;
    // mov edi, device
    let mut code = [&[0xbf][..], &device.to_le_bytes()].concat();
    let start = code.len();
    for (offset, value, whole) in writes {
        match whole {
            // mov dword [edi + offset], value
            true => code.extend([&[0xc7, 0x47, *offset][..], &value.to_le_bytes()].concat()),
            // mov byte [edi + offset], value
            false => code.extend([0xc6, 0x47, *offset, *value as u8]),
        }
    }
    // inc esi; test esi, 0xff; jnz (over everything up to the jump)
    code.extend([0x46, 0xf7, 0xc6, 0xff, 0, 0, 0, 0x75, 7]);
    // mov dx, 0x3f8; mov al, '.'; out dx, al
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee]);
    // jmp start
    let back = start as i32 - (code.len() as i32 + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    code
}
