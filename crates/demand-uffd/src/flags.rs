// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The features of a kernel's userfaultfd, and the modes of a registered range.

use std::fmt;
use std::ops::BitOr;

use linux_raw_sys::general as raw;

/// The accesses that a registered range traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Modes(u64);

impl Modes {
    /// Accesses to pages that are not in the memory object.
    pub const MISSING: Modes = Modes(raw::UFFDIO_REGISTER_MODE_MISSING as u64);
    /// Accesses to pages that are in the memory object but not mapped here. Alone it lets accesses
    /// to holes through: they read zeros, without an event.
    pub const MINOR: Modes = Modes(raw::UFFDIO_REGISTER_MODE_MINOR as u64);
    /// All accesses to pages that are not mapped here, as needed for shared memory that others
    /// fill.
    pub const ALL: Modes = Modes(Modes::MISSING.0 | Modes::MINOR.0);

    /// Returns the bits of `UFFDIO_REGISTER_MODE_*`.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// Returns whether all modes of `other` are set.
    pub(crate) const fn contains(self, other: Modes) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Modes {
    type Output = Modes;

    fn bitor(self, other: Modes) -> Modes {
        Modes(self.0 | other.0)
    }
}

/// Features of a kernel's userfaultfd, as the bits of `UFFD_FEATURE_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// No features.
    pub const NONE: Features = Features(0);
    /// Missing pages of huge-page memory are trapped.
    pub const MISSING_HUGETLBFS: Features = Features(raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Missing pages of shared memory are trapped.
    pub const MISSING_SHMEM: Features = Features(raw::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// Unmapped pages of huge-page memory are trapped.
    pub const MINOR_HUGETLBFS: Features = Features(raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// Unmapped pages of shared memory are trapped.
    pub const MINOR_SHMEM: Features = Features(raw::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// Faults report the exact address that was touched, not that of its page.
    pub const EXACT_ADDRESS: Features = Features(raw::UFFD_FEATURE_EXACT_ADDRESS as u64);
    /// Removed pages (`MADV_REMOVE`, `MADV_DONTNEED`) cause an event.
    pub const EVENT_REMOVE: Features = Features(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// Unmapped ranges cause an event.
    pub const EVENT_UNMAP: Features = Features(raw::UFFD_FEATURE_EVENT_UNMAP as u64);

    /// Pages can be marked, so that an access to them is an error ([`Userfaultfd::poison`]).
    ///
    /// [`Userfaultfd::poison`]: crate::Userfaultfd::poison
    pub const POISON: Features = Features(raw::UFFD_FEATURE_POISON as u64);

    /// The features that guest memory needs, on every backing.
    pub const GUEST_MEMORY: Features = Features(
        Features::MISSING_HUGETLBFS.0
            | Features::MISSING_SHMEM.0
            | Features::MINOR_HUGETLBFS.0
            | Features::MINOR_SHMEM.0,
    );

    /// Returns the features whose bits are set in `bits`.
    pub const fn from_bits(bits: u64) -> Features {
        Features(bits)
    }

    /// Returns the bits of `UFFD_FEATURE_*`.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns whether all features of `other` are set.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns these features without those of `other`.
    pub(crate) const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// Returns the names of the features: the kernel's, without `UFFD_FEATURE_`, or the bit's
    /// number.
    pub fn names(self) -> impl Iterator<Item = String> {
        (0..u64::BITS as usize).filter(move |bit| self.0 >> bit & 1 == 1).map(|bit| {
            NAMES.get(bit).map_or_else(|| format!("bit {bit}"), |name| (*name).to_owned())
        })
    }
}

impl BitOr for Features {
    type Output = Features;

    fn bitor(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

/// The kernel's names, in bit order.
const NAMES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Features::NONE {
            return f.write_str("none");
        }
        f.write_str(&self.names().collect::<Vec<_>>().join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_printed_by_name() {
        let features = Features::MISSING_SHMEM | Features::EXACT_ADDRESS | Features(1 << 40);
        assert_eq!(features.to_string(), "MISSING_SHMEM EXACT_ADDRESS bit 40");
        assert_eq!(Features::NONE.to_string(), "none");
        assert_eq!(Features(1 << 16).to_string(), "MOVE");
    }

    #[test]
    fn all_modes_are_both() {
        assert_eq!(Modes::ALL, Modes::MISSING | Modes::MINOR);
        assert!(!Modes::MINOR.contains(Modes::MISSING));
    }
}
