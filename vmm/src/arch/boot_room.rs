// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Computes where a kernel and its initramfs fit into guest memory.
//!
//! Sources: `Documentation/arch/x86/boot.rst` for the fields of a bzImage's header,
//! `Documentation/filesystems/ramfs-rootfs-initramfs.rst` and `tmpfs.rst` for the unpacking of an
//! initramfs.

use demand_memory::PAGE_SIZE;
use linux_loader::loader::bootparam::setup_header;

const MIB: u64 = 1 << 20;
/// Bytes that Linux needs in addition to its image until its first program runs: measured, rounded.
const KERNEL_OWN: u64 = 4 * MIB;
/// Linux needs one byte per this many bytes of memory to describe it (`struct page`).
const DESCRIBED_BY_ONE: u64 = 64;

/// The memory that a kernel needs, from address 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelRoom {
    /// End of the range reserved for the kernel: its image, and the memory that it uses before it
    /// knows its memory map. Nothing else may lie below.
    pub(crate) end: u64,
    /// The highest end address of an initramfs.
    pub(crate) reach: u64,
}

/// The reason for which an initramfs does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoRoom {
    /// The guest's memory is too small.
    #[error(
        "its {size} bytes and their unpacked content do not fit beside the kernel, which takes \
         memory up to {kernel_end:#x}"
    )]
    Memory {
        /// Size of the initramfs, in bytes.
        size: u64,
        /// End of the kernel's memory.
        kernel_end: u64,
        /// Size of the smallest memory that would do, in bytes.
        needed: u64,
    },
    /// No amount of memory helps, because the kernel cannot read an initramfs at higher addresses.
    #[error(
        "its {size} bytes do not fit between the kernel, which takes memory up to \
         {kernel_end:#x}, and {reach:#x}, the end of what the kernel can reach"
    )]
    Reach {
        /// Size of the initramfs, in bytes.
        size: u64,
        /// End of the kernel's memory.
        kernel_end: u64,
        /// End of the addresses that the kernel can read an initramfs from.
        reach: u64,
    },
}

impl NoRoom {
    /// Returns the hint for the user.
    pub(crate) fn remedy(&self) -> String {
        match self {
            NoRoom::Memory { needed, .. } => {
                format!("give the guest at least {}M with --memory", needed.div_ceil(MIB))
            }
            NoRoom::Reach { .. } => "make it smaller; more --memory does not help".into(),
        }
    }
}

impl KernelRoom {
    /// Returns the room for a bzImage of `len` bytes that was loaded at `load`. The kernel moves to
    /// its preferred address if it lies below that or is not relocatable, and unpacks itself there.
    pub(crate) fn of_bzimage(header: &setup_header, load: u64, len: u64) -> Self {
        let start = if header.relocatable_kernel == 0 {
            header.pref_address
        } else {
            let align = u64::from(header.kernel_alignment).max(1);
            load.max(header.pref_address).checked_next_multiple_of(align).unwrap_or(u64::MAX)
        };
        let end = start.saturating_add(header.init_size.into());
        KernelRoom {
            end: end.max(load.saturating_add(len)),
            reach: u64::from(header.initrd_addr_max) + 1,
        }
    }

    /// Returns the address of an initramfs of `size` bytes, as high as the kernel can reach. The
    /// memory has `low_end` bytes from address 0 on and `total` bytes in all, and `unpacked` is the
    /// number of bytes of memory needed per byte of the initramfs.
    pub(crate) fn place(
        &self,
        size: u64,
        unpacked: u64,
        low_end: u64,
        total: u64,
    ) -> Result<u64, NoRoom> {
        let pages = size.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
        let kernel_end = self.end;
        let loaded = kernel_end.saturating_add(pages);
        if loaded > self.reach {
            return Err(NoRoom::Reach { size, kernel_end, reach: self.reach });
        }
        let used = loaded.saturating_add(size.saturating_mul(unpacked)).saturating_add(KERNEL_OWN);
        let needed = used.saturating_add(used / (DESCRIBED_BY_ONE - 1));
        if low_end < loaded || total < needed {
            return Err(NoRoom::Memory { size, kernel_end, needed });
        }
        Ok((low_end.min(self.reach) - size) & !(PAGE_SIZE - 1))
    }
}

/// Returns the number of bytes of memory needed per byte of an initramfs for unpacking. Linux
/// unpacks it into a tmpfs, which may use half of the memory, unless the command line asks for
/// another root. The unpacked size of a compressed initramfs is unknown, but not below its own
/// size.
pub(crate) fn unpacked(cmdline: &str) -> u64 {
    let asks = |word: &str| word.starts_with("root=") || word.starts_with("rootfstype=");
    if cmdline.split_whitespace().any(asks) { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(relocatable: u8) -> setup_header {
        setup_header {
            relocatable_kernel: relocatable,
            kernel_alignment: 2 << 20,
            pref_address: 16 << 20,
            init_size: (18 << 20) + 4096,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        }
    }

    #[test]
    fn bzimage_runs_at_its_preferred_address() {
        for relocatable in [0, 1] {
            let room = KernelRoom::of_bzimage(&header(relocatable), MIB, 5 * MIB);
            assert_eq!(room, KernelRoom { end: 34 * MIB + 4096, reach: 2048 * MIB });
        }
        let above = |relocatable| KernelRoom::of_bzimage(&header(relocatable), 31 * MIB, MIB).end;
        assert_eq!((above(0), above(1)), (34 * MIB + 4096, 50 * MIB + 4096));
    }

    #[test]
    fn an_initramfs_lies_high_and_beside_the_kernel() {
        let room = KernelRoom { end: 34 * MIB, reach: 2048 * MIB };
        let place = |size, memory| room.place(size, 2, memory, memory);
        assert_eq!(place(16 * MIB, 128 * MIB), Ok(112 * MIB));
        assert_eq!(place(MIB + 1, 4096 * MIB), Ok(2047 * MIB - PAGE_SIZE));
        let Err(NoRoom::Memory { needed, .. }) = place(16 * MIB, 48 * MIB) else { panic!() };
        assert!(place(16 * MIB, needed).is_ok() && place(16 * MIB, needed - 1).is_err());
        // Half of the memory lies above 4 GiB.
        assert!(room.place(16 * MIB, 2, 50 * MIB, needed).is_ok());
        assert!(room.place(16 * MIB, 2, 50 * MIB - 1, needed).is_err());
        for size in [2014 * MIB + 1, 1 << 50, u64::MAX] {
            let Err(error) = place(size, 4096 * MIB) else { panic!() };
            assert!(matches!(error, NoRoom::Reach { .. }) && !error.remedy().is_empty());
        }
    }

    #[test]
    fn another_root_is_not_filled() {
        assert_eq!((unpacked("quiet root=/dev/vda"), unpacked("quiet noroot=1")), (1, 2));
    }
}
