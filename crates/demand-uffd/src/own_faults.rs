// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of faults in a mapping of this process.

use demand_memory::FaultPath;

/// How faults in a mapping of this process are counted and served.
///
/// # Examples
///
/// ```
/// use demand_memory::FaultPath;
/// use demand_uffd::OwnFaults;
///
/// // One page per fault, or 64 KiB.
/// let single = OwnFaults::from(FaultPath::Vmm);
/// let around = OwnFaults { around: 64 << 10, ..single };
/// assert!(single.around < around.around);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnFaults {
    /// The path that the faults are counted for.
    pub path: FaultPath,
    /// Number of bytes that one fault fetches, rounded up to whole units of the backing: the
    /// aligned block of this size around the address. The faulter waits only for its own unit;
    /// other units are mapped with it if they are present by then. A distant source answers such a
    /// fault hardly later than one for a page, and a sequential reader faults less often.
    pub around: u64,
}

impl From<FaultPath> for OwnFaults {
    /// Returns faults for this path that fetch one unit each.
    fn from(path: FaultPath) -> Self {
        OwnFaults { path, around: 0 }
    }
}
