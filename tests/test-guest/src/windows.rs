// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The place of the memory under test in a VM that has more memory.
//!
//! A byte of it has three kinds of address:
//!
//! | address | meaning |
//! |---|---|
//! | offset | its place in the memory under test, which is also its guest virtual address |
//! | packed offset | its place in the VM's memory with all regions adjacent, as in an image |
//! | guest address | its guest physical address: memory skips the hole below [`HIGH_MEMORY`] |

use crate::content::UNIT_BYTES;
use crate::error::{PlanError, refuse};

/// Upper limit of memory below 4 GiB, guest physical: devices follow.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Start of the memory that does not fit below, guest physical.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;
/// Maximum size of a VM's memory, in bytes: the part of 46 bits of physical address that the hole
/// and the control region leave.
pub const VM_LIMIT: u64 = (1 << 46) - (4 << 30);

/// Number of parts of the memory under test.
const PARTS: u64 = 4;

/// Returns the guest physical address of a byte of the VM's memory.
pub const fn guest_address(packed: u64) -> u64 {
    if packed < LOW_MEMORY_END { packed } else { packed - LOW_MEMORY_END + HIGH_MEMORY }
}

/// Returns the packed offset for a guest physical address; `None` in the hole.
const fn packed_offset(address: u64) -> Option<u64> {
    match address {
        0..LOW_MEMORY_END => Some(address),
        HIGH_MEMORY.. => Some(address - HIGH_MEMORY + LOW_MEMORY_END),
        _ => None,
    }
}

/// A piece of the memory under test that is contiguous in the VM's memory, also in guest addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Window {
    /// Its first byte in the memory under test; a multiple of the unit.
    pub offset: u64,
    /// Its first byte in the VM's memory; a multiple of the unit.
    pub packed: u64,
    /// Its length, in bytes; a multiple of the unit.
    pub bytes: u64,
}

/// The pieces of the memory under test, by offset.
///
/// One part of it lies at the start of the VM's memory, one ends at the hole, one begins right
/// above the hole, one ends at the end. In a VM whose memory does not reach the hole, the two
/// middle parts meet in the middle of its memory; in one that barely does, they move down as far as
/// necessary. Adjacent parts form one window.
///
/// # Examples
///
/// ```
/// use test_guest::windows::Windows;
///
/// const GIB: u64 = 1 << 30;
/// let windows = Windows::new(GIB, 64 * GIB).unwrap();
/// let quarter = GIB / 4;
/// assert_eq!(windows.guest_address(0), 0);
/// assert_eq!(windows.guest_address(2 * quarter - 1), 3 * GIB - 1);
/// assert_eq!(windows.guest_address(2 * quarter), 4 * GIB);
/// assert_eq!(windows.packed(4 * quarter - 1), 64 * GIB - 1);
/// // All of the VM's memory is under test.
/// assert_eq!(Windows::new(GIB, GIB).unwrap().list().len(), 1);
/// ```
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Windows {
    list: Vec<Window>,
    vm_bytes: u64,
}

impl Windows {
    /// Computes the windows of `memory_bytes` under test in a VM of `vm_bytes`, both in bytes.
    ///
    /// # Errors
    /// If one of them is not a multiple of the unit, or the memory under test exceeds the VM's.
    pub fn new(memory_bytes: u64, vm_bytes: u64) -> Result<Self, PlanError> {
        if memory_bytes == 0
            || !memory_bytes.is_multiple_of(UNIT_BYTES)
            || memory_bytes > LOW_MEMORY_END
        {
            let limit = format!("it must be a multiple of {UNIT_BYTES} up to {LOW_MEMORY_END}");
            return Err(refuse("memory_bytes", memory_bytes, limit));
        }
        if !vm_bytes.is_multiple_of(UNIT_BYTES) || !(memory_bytes..=VM_LIMIT).contains(&vm_bytes) {
            let limit = format!(
                "it must be a multiple of {UNIT_BYTES} from memory_bytes, {memory_bytes}, up to \
                 {VM_LIMIT}"
            );
            return Err(refuse("vm_bytes", vm_bytes, limit));
        }
        let units = memory_bytes / UNIT_BYTES;
        let part = |index| index * units / PARTS * UNIT_BYTES;
        let (half, quarter, last) = (part(2), part(1), part(3));
        let wanted = if vm_bytes > LOW_MEMORY_END {
            LOW_MEMORY_END
        } else {
            vm_bytes / UNIT_BYTES / 2 * UNIT_BYTES
        };
        let middle = wanted.clamp(half, vm_bytes - (memory_bytes - half));
        let mut windows = Windows { list: Vec::new(), vm_bytes };
        windows.add(0, 0, quarter);
        windows.add(quarter, middle - (half - quarter), half - quarter);
        windows.add(half, middle, last - half);
        windows.add(last, vm_bytes - (memory_bytes - last), memory_bytes - last);
        Ok(windows)
    }

    /// Appends a window, split at the hole, or extends the last one.
    fn add(&mut self, offset: u64, packed: u64, bytes: u64) {
        if packed < LOW_MEMORY_END && packed + bytes > LOW_MEMORY_END {
            let below = LOW_MEMORY_END - packed;
            self.add(offset, packed, below);
            return self.add(offset + below, LOW_MEMORY_END, bytes - below);
        }
        match self.list.last_mut() {
            _ if bytes == 0 => {}
            Some(last) if last.packed + last.bytes == packed && packed != LOW_MEMORY_END => {
                last.bytes += bytes;
            }
            _ => self.list.push(Window { offset, packed, bytes }),
        }
    }

    /// Returns the windows.
    pub fn list(&self) -> &[Window] {
        &self.list
    }

    /// Returns the size of the VM's memory, in bytes.
    pub fn vm_bytes(&self) -> u64 {
        self.vm_bytes
    }

    /// Returns the size of the memory under test, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.list.last().map_or(0, |window| window.offset + window.bytes)
    }

    /// Returns the packed offset of the byte at `offset`.
    ///
    /// # Panics
    /// If `offset` is outside the memory under test.
    pub fn packed(&self, offset: u64) -> u64 {
        let after = self.list.partition_point(|window| window.offset <= offset);
        let window = &self.list[after - 1];
        assert!(offset - window.offset < window.bytes, "{offset:#x} is not under test");
        window.packed + (offset - window.offset)
    }

    /// Returns the guest physical address of the byte at `offset`.
    ///
    /// # Panics
    /// If `offset` is outside the memory under test.
    pub fn guest_address(&self, offset: u64) -> u64 {
        guest_address(self.packed(offset))
    }

    /// Returns the offset of the byte at a guest physical address; `None` if it is not under test.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        let packed = packed_offset(address)?;
        self.list.iter().find_map(|window| {
            let inside = packed.checked_sub(window.packed)?;
            (inside < window.bytes).then_some(window.offset + inside)
        })
    }

    /// Returns the parts of the VM's memory that are not under test: pairs of packed offsets, start
    /// and end.
    pub fn gaps(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = self.list.iter().map(|window| window.packed + window.bytes);
        let starts = self.list.iter().map(|window| window.packed);
        std::iter::once(0)
            .chain(ends)
            .zip(starts.chain([self.vm_bytes]))
            .filter(|(from, to)| from < to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    fn windows(memory: u64, vm: u64) -> Vec<(u64, u64, u64)> {
        let windows = Windows::new(memory, vm).unwrap();
        let list = windows.list().iter();
        list.map(|window| (window.offset, guest_address(window.packed), window.bytes)).collect()
    }

    #[test]
    fn windows_lie_at_both_ends_and_around_hole() {
        assert_eq!(
            windows(16 * M, 5 * G),
            [
                (0, 0, 4 * M),
                (4 * M, 3 * G - 4 * M, 4 * M),
                (8 * M, 4 * G, 4 * M),
                (12 * M, 6 * G - 4 * M, 4 * M)
            ]
        );
        // Below the hole: in the middle.
        assert_eq!(
            windows(16 * M, 3 * G),
            [(0, 0, 4 * M), (4 * M, 3 * G / 2 - 4 * M, 8 * M), (12 * M, 3 * G - 4 * M, 4 * M)]
        );
        // Barely above it: split by it.
        assert_eq!(
            windows(16 * M, 3 * G + 2 * M),
            [(0, 0, 4 * M), (4 * M, 3 * G - 10 * M, 10 * M), (14 * M, 4 * G, 2 * M)]
        );
        // All of the VM's memory.
        assert_eq!(windows(64 * M, 64 * M), [(0, 0, 64 * M)]);
        assert_eq!(windows(3 * G, 3 * G), [(0, 0, 3 * G)]);
        // One unit.
        assert_eq!(windows(2 * M, 5 * G), [(0, 6 * G - 2 * M, 2 * M)]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for (memory, vm) in [
            (0, 0),
            (5000, 2 * M),
            (2 * M, 0),
            (4 * M, 2 * M),
            (2 * M, 3 * M),
            (3 * G + 2 * M, 8 * G),
            (2 * M, 1 << 46),
        ] {
            let error = Windows::new(memory, vm).unwrap_err().to_string();
            assert!(error.contains("_bytes = "), "{error}");
        }
    }

    /// For all sizes: each byte has one place, each place is in memory, and the translation is
    /// reversible.
    #[test]
    fn names_translate_both_ways() {
        for memory in [2 * M, 6 * M, 64 * M, G + 2 * M, 3 * G] {
            for vm in [memory, memory + 2 * M, 2 * memory, 3 * G - 2 * M, 3 * G, 3 * G + 2 * M]
                .into_iter()
                .chain([3 * G + 30 * M, 5 * G, 64 * G, 500 * G])
                .filter(|&vm| vm >= memory)
            {
                let windows = Windows::new(memory, vm).unwrap();
                assert_eq!((windows.memory_bytes(), windows.vm_bytes()), (memory, vm));
                let outside: u64 = windows.gaps().map(|(from, to)| to - from).sum();
                assert_eq!(outside + memory, vm);
                let mut end = 0;
                for unit in 0..memory / UNIT_BYTES {
                    let offset = unit * UNIT_BYTES;
                    let packed = windows.packed(offset);
                    assert!(packed >= end, "in order, and apart");
                    end = packed + UNIT_BYTES;
                    for at in [offset, offset + UNIT_BYTES - 1] {
                        let address = windows.guest_address(at);
                        assert_eq!(windows.offset_of(address), Some(at));
                        assert!(!(LOW_MEMORY_END..HIGH_MEMORY).contains(&address));
                    }
                }
                assert!(end <= vm);
                for (from, to) in windows.gaps() {
                    assert_eq!(windows.offset_of(guest_address(from)), None);
                    assert_eq!(windows.offset_of(guest_address(to - 1)), None);
                }
                assert_eq!(windows.offset_of(LOW_MEMORY_END), None);
                assert_eq!(windows.offset_of(HIGH_MEMORY - 1), None);
            }
        }
    }
}
