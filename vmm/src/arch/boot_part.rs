// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The roles of the files that a guest boots from.

/// The role of a boot file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BootPart {
    /// The kernel: a bzImage, or an ELF image with a PVH entry.
    Kernel,
    /// The initramfs, a cpio archive.
    Initramfs,
}

impl BootPart {
    /// Returns the part's name, which is also its file name in a snapshot.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            BootPart::Kernel => "kernel",
            BootPart::Initramfs => "initramfs",
        }
    }
}
