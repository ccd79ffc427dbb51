// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page tables for long mode.

use std::ops::Range;

/// Size of a page that the tables map, in bytes.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Size of a table, in bytes.
const TABLE: u64 = 4096;
const ENTRIES: usize = 512;

// Bits of an entry. Accessed and dirty are set from the start, so that a page walk writes nothing.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TO_TABLE: u64 = PRESENT | WRITABLE | ACCESSED;
const TO_PAGE: u64 = TO_TABLE | DIRTY | LARGE;

/// The shifts of a virtual address to the index in a table of level 4, 3 and 2.
const LEVEL_4: u32 = 39;
const LEVEL_3: u32 = 30;
const LEVEL_2: u32 = 21;

/// Long-mode page tables under construction. They map pages of [`LARGE_PAGE`], for ring 0, and lie
/// one behind another in guest memory: first the root, then each table in the order in which an
/// address first needed it.
///
/// # Examples
///
/// ```
/// use bare_guest::PageTables;
///
/// let mut tables = PageTables::new(0x1000);
/// tables.map(0..3 << 30, 0);
/// // Level 4, level 3, and level 2 for each GiB.
/// assert_eq!(tables.size(), 5 * 4096);
/// assert_eq!(tables.physical((2 << 30) + 7), Some((2 << 30) + 7));
/// assert_eq!(tables.physical(3 << 30), None);
/// ```
#[derive(Clone, Debug)]
pub struct PageTables {
    root: u64,
    tables: Vec<[u64; ENTRIES]>,
}

impl PageTables {
    /// Creates tables that map nothing, with the level 4 table at guest physical address `root`.
    ///
    /// # Panics
    ///
    /// If `root` is not a multiple of 4096.
    pub fn new(root: u64) -> Self {
        assert!(root.is_multiple_of(TABLE), "{root:#x} is not the address of a page");
        PageTables { root, tables: vec![[0; ENTRIES]] }
    }

    /// Maps virtual `addresses` to guest physical memory from `physical` on.
    ///
    /// # Panics
    ///
    /// If one of these is not a multiple of [`LARGE_PAGE`].
    pub fn map(&mut self, addresses: Range<u64>, physical: u64) {
        for bound in [addresses.start, addresses.end, physical] {
            assert!(bound.is_multiple_of(LARGE_PAGE), "{bound:#x} is not a multiple of 2 MiB");
        }
        let mut page = physical;
        let mut address = addresses.start;
        while address < addresses.end {
            let level_3 = self.below(0, index(address, LEVEL_4));
            let level_2 = self.below(level_3, index(address, LEVEL_3));
            self.tables[level_2][index(address, LEVEL_2)] = page | TO_PAGE;
            address += LARGE_PAGE;
            page += LARGE_PAGE;
        }
    }

    /// Makes entry `index` of the level 4 table point to the caller's own level 3 table at guest
    /// physical address `table`. The entry covers 512 GiB, from `index << 39` on.
    pub fn link(&mut self, index: usize, table: u64) {
        self.tables[0][index] = table | TO_TABLE;
    }

    /// Returns the guest physical address of the level 4 table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Returns the size of all tables, in bytes.
    pub fn size(&self) -> u64 {
        self.tables.len() as u64 * TABLE
    }

    /// Returns the guest physical address and the value of each entry of each table.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u64)> {
        (self.root..).step_by(8).zip(self.tables.iter().flatten().copied())
    }

    /// Returns the guest physical address to which a virtual one leads; `None` if it is not mapped.
    pub fn physical(&self, address: u64) -> Option<u64> {
        let level_3 = self.table(self.tables[0][index(address, LEVEL_4)])?;
        let level_2 = self.table(self.tables[level_3][index(address, LEVEL_3)])?;
        let entry = self.tables[level_2][index(address, LEVEL_2)];
        (entry != 0).then_some(entry & !(LARGE_PAGE - 1) | address & (LARGE_PAGE - 1))
    }

    /// Returns the number of the table below an entry, which is created if necessary.
    fn below(&mut self, table: usize, index: usize) -> usize {
        if let Some(below) = self.table(self.tables[table][index]) {
            return below;
        }
        self.tables[table][index] = (self.root + self.size()) | TO_TABLE;
        self.tables.push([0; ENTRIES]);
        self.tables.len() - 1
    }

    /// Returns the number of the table that an entry points to.
    fn table(&self, entry: u64) -> Option<usize> {
        let address = entry & !(TABLE - 1);
        let number = usize::try_from(address.checked_sub(self.root)? / TABLE).ok()?;
        (entry != 0 && number < self.tables.len()).then_some(number)
    }
}

/// Returns the index of an address in a table.
fn index(address: u64, level: u32) -> usize {
    usize::try_from(address >> level & 0x1ff).expect("it has 9 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lead_to_their_pages() {
        const GIB: u64 = 1 << 30;
        let mut tables = PageTables::new(0x7000);
        tables.map(GIB - LARGE_PAGE..GIB + LARGE_PAGE, 40 * GIB);
        tables.map(600 * GIB..601 * GIB, 0);
        assert_eq!(tables.physical(GIB - LARGE_PAGE), Some(40 * GIB));
        assert_eq!(tables.physical(GIB + 5), Some(40 * GIB + LARGE_PAGE + 5));
        assert_eq!(tables.physical(GIB + LARGE_PAGE), None);
        assert_eq!(tables.physical(600 * GIB + 1), Some(1));
        assert_eq!(tables.physical(599 * GIB), None);
        assert_eq!(tables.size(), 6 * TABLE);
    }

    #[test]
    fn entries_cover_all_tables() {
        let mut tables = PageTables::new(0x7000);
        tables.map(0..LARGE_PAGE, 4 * LARGE_PAGE);
        tables.link(1, 0x5000);
        let entries = tables.entries().collect::<Vec<_>>();
        assert_eq!(entries.len(), 3 * ENTRIES);
        let set = entries.into_iter().filter(|(_, entry)| *entry != 0).collect::<Vec<_>>();
        let expected = [(0x7000, 0x8023), (0x7008, 0x5023), (0x8000, 0x9023), (0x9000, 0x80_00e3)];
        assert_eq!(set, expected);
    }
}
