// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ELF images of kernels, of one loadable segment.

/// Length of the ELF header, in bytes.
const HEADER: u64 = 64;
/// Length of a program header, in bytes.
const PROGRAM: u64 = 56;
/// Offset of the note with the PVH entry, behind two program headers.
const NOTE: u64 = HEADER + 2 * PROGRAM;
/// Length of the note, in bytes.
const NOTE_LEN: u64 = 24;

/// Offset in bytes of the code of an image [`with_pvh_entry`].
pub const CODE: u64 = NOTE + NOTE_LEN;

/// Returns an image that could be loaded at guest address `start`, without information on how to
/// boot it.
pub fn without_entry(start: u64) -> Vec<u8> {
    let len = HEADER + PROGRAM;
    bytes(header(start, 1).into_iter().chain(program(1, 0, start, (len, len))))
}

/// Returns an image with a PVH entry, at which `code` runs: 32-bit, with flat segments, no paging
/// and no interrupt table. It is loaded at guest address `start`, where it takes `memory` bytes, or
/// as many as it has.
pub fn with_pvh_entry(start: u64, memory: Option<u64>, code: &[u8]) -> Vec<u8> {
    let len = CODE + code.len() as u64;
    // XEN_ELFNOTE_PHYS32_ENTRY, by "Xen".
    let name = u64::from(u32::from_le_bytes(*b"Xen\0"));
    let note = [(4, 4), (8, 4), (18, 4), (name, 4), (start + CODE, 8)];
    let words = header(start, 2)
        .into_iter()
        .chain(program(1, 0, start, (len, memory.unwrap_or(len))))
        .chain(program(4, NOTE, 0, (NOTE_LEN, NOTE_LEN)))
        .chain(note);
    let mut image = bytes(words);
    image.extend(code);
    image
}

/// A value and its length in bytes.
type Word = (u64, usize);

/// An executable for x86-64 of 64 bits, with its entry at `start`.
fn header(start: u64, programs: u64) -> [Word; 13] {
    [
        (u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"), 8),
        (0, 8),
        (2, 2),
        (62, 2),
        (1, 4),
        (start, 8),
        (HEADER, 8),
        (0, 8),
        (0, 4),
        (HEADER, 2),
        (PROGRAM, 2),
        (programs, 2),
        (0, 6),
    ]
}

/// A segment of this kind, with its lengths in the file and in memory.
fn program(kind: u64, offset: u64, address: u64, (file, memory): (u64, u64)) -> [Word; 8] {
    [
        (kind, 4),
        (5, 4),
        (offset, 8),
        (address, 8),
        (address, 8),
        (file, 8),
        (memory, 8),
        (if kind == 1 { 4096 } else { 4 }, 8),
    ]
}

/// Returns the words' bytes, the lowest first.
fn bytes(words: impl IntoIterator<Item = Word>) -> Vec<u8> {
    words.into_iter().flat_map(|(value, len)| value.to_le_bytes().into_iter().take(len)).collect()
}
