// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pages of a guest's page tables, which the instruction emulator of KVM walks by itself.
//!
//! Where an engine makes KVM's own accesses to missing pages fail, a missing page table shows to
//! the guest as a page fault that it did not cause. The processor walks tables, too; but its walks
//! stop the vCPU as any other access does. So only pages matter that the processor has not walked:
//! those of an emulated instruction's second operand.

use std::collections::HashSet;

use demand_memory::{PAGE_SIZE, Waiter, to_usize};
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use crate::{FaultError, FaultHandler};

/// The most pages that are fetched for one vCPU: 16 MiB. A guest with more tables than this is
/// unusual, and must not wait for them all before it runs.
const MOST: usize = 4096;

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Bits of an entry: it refers to something; it refers to memory and not to a table.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// The bits of an entry, or of CR3, that are a page's address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The layout of page tables in one mode of the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    levels: u32,
    /// Length of an entry, in bytes.
    entry: usize,
    /// The part of the root's page that belongs to the kernel, in entries: all of the root, except
    /// in long mode.
    root: (usize, usize),
    /// Offset of the root in its page, in bytes.
    offset: usize,
}

impl Layout {
    /// Returns the layout; `None` without paging. Source: Intel SDM, volume 3A, chapter "Paging".
    fn of(sregs: &kvm_sregs) -> Option<Self> {
        if sregs.cr0 & CR0_PG == 0 {
            return None;
        }
        let long = Layout { levels: 4, entry: 8, root: (256, 512), offset: 0 };
        Some(if sregs.efer & EFER_LMA != 0 {
            if sregs.cr4 & CR4_LA57 != 0 { Layout { levels: 5, ..long } } else { long }
        } else if sregs.cr4 & CR4_PAE != 0 {
            let offset = to_usize(sregs.cr3 & 0xfe0);
            Layout { levels: 3, entry: 8, root: (0, 4), offset }
        } else {
            Layout { levels: 2, entry: 4, root: (0, 1024), offset: 0 }
        })
    }

    /// Returns the tables that a table's page refers to.
    fn tables(self, page: &[u8], is_root: bool) -> impl Iterator<Item = u64> {
        let (from, to) = if is_root { self.root } else { (0, to_usize(PAGE_SIZE) / self.entry) };
        let offset = if is_root { self.offset } else { 0 };
        // An entry of the root of PAE paging has no such bit.
        let large = if is_root && self.levels == 3 { 0 } else { LARGE };
        let bytes = page[offset..].chunks_exact(self.entry).take(to).skip(from);
        let entries = bytes.map(|bytes| {
            let mut entry = [0; 8];
            entry[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(entry)
        });
        entries
            .filter(move |entry| entry & (PRESENT | large) == PRESENT)
            .map(|entry| entry & ADDRESS)
    }
}

/// Fetches the page tables of the guest's kernel that lie in demand-paged regions: in long mode
/// those of the upper half of addresses, in other modes all. Other address spaces of the guest
/// share these tables. Returns the number of tables.
///
/// It waits as long as the source does; the tables of a level are fetched together.
///
/// # Errors
///
/// [`FaultError::Kicked`] and [`FaultError::Stopped`].
pub(crate) fn fetch_kernels(
    sregs: &kvm_sregs,
    handler: &FaultHandler,
    memory: &impl Bytes<GuestAddress>,
    waiter: &Waiter,
) -> Result<usize, FaultError> {
    let Some(layout) = Layout::of(sregs) else { return Ok(0) };
    let root = sregs.cr3 & ADDRESS;
    let (mut known, mut level) = (HashSet::from([root]), vec![root]);
    for depth in 0..layout.levels {
        level.iter().for_each(|table| handler.request(*table, PAGE_SIZE));
        for table in &level {
            handler.fetch(*table, PAGE_SIZE, waiter)?;
        }
        if depth + 1 == layout.levels {
            break;
        }
        let mut next = Vec::new();
        let mut page = [0; to_usize(PAGE_SIZE)];
        for table in level {
            // The guest may hold anything there, even what is no memory.
            if !handler.covers(table, PAGE_SIZE)
                || memory.read_slice(&mut page, GuestAddress(table)).is_err()
            {
                continue;
            }
            next.extend(layout.tables(&page, depth == 0).filter(|table| known.insert(*table)));
            if known.len() > MOST {
                log::warn!(
                    "the guest's kernel has more than {MOST} page tables; those that are missing \
                     are not fetched before it runs: see uffd-poison in demand-kvm's README"
                );
                return Ok(known.len());
            }
        }
        level = next;
    }
    Ok(known.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sregs(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> kvm_sregs {
        kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() }
    }

    #[test]
    fn layouts_follow_the_processors_mode() {
        let levels = |sregs: &kvm_sregs| Layout::of(sregs).map(|layout| layout.levels);
        assert_eq!(levels(&sregs(0, 0, CR4_PAE, EFER_LMA)), None);
        assert_eq!(levels(&sregs(CR0_PG, 0, 0, 0)), Some(2));
        assert_eq!(levels(&sregs(CR0_PG, 0, CR4_PAE, 0)), Some(3));
        assert_eq!(levels(&sregs(CR0_PG, 0, CR4_PAE, EFER_LMA)), Some(4));
        assert_eq!(levels(&sregs(CR0_PG, 0, CR4_PAE | CR4_LA57, EFER_LMA)), Some(5));
    }

    #[test]
    fn tables_are_present_and_no_large_pages() {
        let mut page = vec![0; 4096];
        let mut put = |index: usize, entry: u64| {
            page[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        };
        put(3, 0x5000 | PRESENT);
        put(300, 0x8000_0000_0000_7000 | PRESENT);
        put(301, 0x20_0000 | PRESENT | LARGE);
        put(302, 0x9000);
        let long = Layout::of(&sregs(CR0_PG, 0, CR4_PAE, EFER_LMA)).unwrap();
        assert_eq!(long.tables(&page, true).collect::<Vec<_>>(), [0x7000]);
        assert_eq!(long.tables(&page, false).collect::<Vec<_>>(), [0x5000, 0x7000]);
        let pae = Layout::of(&sregs(CR0_PG, 0, CR4_PAE, 0)).unwrap();
        assert_eq!(pae.tables(&page, true).collect::<Vec<_>>(), [0x5000]);
        let moved = Layout::of(&sregs(CR0_PG, 24 << 3 & 0xfe0, CR4_PAE, 0)).unwrap();
        assert_eq!(moved.tables(&page, true).count(), 0);
    }
}
