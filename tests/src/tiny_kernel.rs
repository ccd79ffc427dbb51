// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernels of a few instructions, which any KVM can run.

/// Returns an ELF image that could be loaded at 16 MiB, without information on how to boot it.
pub fn plain_elf() -> Vec<u8> {
    // Values and their lengths; the lowest byte comes first.
    let header = [
        // 64 bits; an executable for x86-64 with entry at 16 MiB and one program header.
        (u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"), 8),
        (0, 8),
        (2, 2),
        (62, 2),
        (1, 4),
        (0x100_0000, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2),
        (0, 6),
    ];
    // Load the whole file there.
    let program =
        [(1, 4), (5, 4), (0, 8), (0x100_0000, 8), (0x100_0000, 8), (120, 8), (120, 8), (4096, 8)];
    let words = header.into_iter().chain(program);
    words.flat_map(|(value, len)| value.to_le_bytes().into_iter().take(len)).collect()
}

/// Returns an ELF image with a PVH entry, at which `code` runs: 32-bit, with flat segments, no
/// paging and no interrupt table.
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    /// Offset of the note in the file, after two program headers; the code follows the note.
    const NOTE: u64 = 64 + 2 * 56;
    let mut file = plain_elf();
    // Two program headers; the first loads all of the file.
    file[56] = 2;
    let len = NOTE + 24 + code.len() as u64;
    for at in [64 + 32, 64 + 40] {
        file[at..at + 8].copy_from_slice(&len.to_le_bytes());
    }
    let note = [(4, 4), (4, 4), (NOTE, 8), (0, 8), (0, 8), (24, 8), (24, 8), (4, 8)];
    // XEN_ELFNOTE_PHYS32_ENTRY, by "Xen".
    let content = [(4, 4), (8, 4), (18, 4), (u64::from(u32::from_le_bytes(*b"Xen\0")), 4)];
    let words = note.into_iter().chain(content).chain([(0x100_0000 + NOTE + 24, 8)]);
    file.extend(words.flat_map(|(value, len)| value.to_le_bytes().into_iter().take(len)));
    file.extend(code);
    file
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
