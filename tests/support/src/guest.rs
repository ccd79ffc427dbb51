// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests: what to boot, prepared by the lab's runner (`cargo lab guests`), each with
//! `guest-work` as its first program.

use std::env;
use std::path::{Path, PathBuf};

use guest_work::Work;

use crate::host;

/// A kernel and the initramfs that goes with it.
#[derive(Debug, Clone)]
pub struct GuestLinux {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl GuestLinux {
    /// The lab's own kernel, 6.12, as a bzImage; everything is built in, VMGENID too.
    ///
    /// Outside the lab there is none: the test is skipped.
    ///
    /// # Panics
    ///
    /// In the lab, if it was not told to have guests.
    pub fn lab() -> Option<Self> {
        Self::named("LAB_GUEST_BZIMAGE", "LAB_GUEST_INITRAMFS")
    }

    /// The same kernel as an ELF file with a PVH entry. See [`GuestLinux::lab`].
    pub fn lab_elf() -> Option<Self> {
        Self::named("LAB_GUEST_VMLINUX", "LAB_GUEST_INITRAMFS")
    }

    /// Debian's kernel for cloud machines as a bzImage, unmodified: virtio comes as modules, ext4
    /// is built in, VMGENID is not there. See [`GuestLinux::lab`].
    pub fn debian() -> Option<Self> {
        Self::named("LAB_GUEST_DEBIAN_BZIMAGE", "LAB_GUEST_DEBIAN_INITRAMFS")
    }

    fn named(kernel: &str, initramfs: &str) -> Option<Self> {
        let Some((kernel, initramfs)) = env::var_os(kernel).zip(env::var_os(initramfs)) else {
            host::skip("Linux guests are booted in the lab: LAB_GUESTS=1 cargo lab test ...");
            return None;
        };
        Some(Self { kernel: kernel.into(), initramfs: initramfs.into() })
    }

    /// Path of the kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Path of the initramfs, a cpio archive that is not compressed.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// A command line for the kernel: the console is the first serial port, a panic restarts the
    /// machine, and the program does that work.
    ///
    /// XSAVE is off: in the lab a guest's kernel warns otherwise that CPUID gives a size for it of 576
    /// bytes, which has no room for AVX and the like, where it worked out 2696. The cause of that is
    /// not established.
    pub fn command_line(work: &Work) -> String {
        format!("console=ttyS0 quiet panic=-1 noxsave work={work}")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Whether the file has that there, in bytes from its start.
    fn has(path: &Path, at: u64, wanted: &[u8]) -> bool {
        let mut found = vec![0; wanted.len()];
        File::open(path).and_then(|file| file.read_exact_at(&mut found, at)).expect("readable");
        found == wanted
    }

    #[test]
    fn guests_are_what_they_are_called() {
        let (Some(lab), Some(elf), Some(debian)) =
            (GuestLinux::lab(), GuestLinux::lab_elf(), GuestLinux::debian())
        else {
            return;
        };
        // The boot protocol's magic number, an ELF file's, and that of a cpio archive.
        assert!(has(lab.kernel(), 0x202, b"HdrS"));
        assert!(has(debian.kernel(), 0x202, b"HdrS"));
        assert!(has(elf.kernel(), 0, b"\x7fELF"));
        for guest in [&lab, &elf, &debian] {
            assert!(has(guest.initramfs(), 0, b"070701"), "{guest:?}");
        }
    }
}
