// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this host's userfaultfd can do.

use std::fmt;

use demand_memory::{Backing, BackingKind, MemfdBacking};

use crate::{Features, Modes, OpenError, Userfaultfd};

/// Whether something works here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does.
    Yes,
    /// It does not; one line says why.
    No(String),
}

impl Answer {
    /// Whether it works.
    pub fn is_yes(&self) -> bool {
        *self == Answer::Yes
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Yes => f.write_str("yes"),
            Answer::No(why) => write!(f, "no: {why}"),
        }
    }
}

/// How this process comes by a userfaultfd that serves faults of the kernel. Source:
/// Documentation/admin-guide/mm/userfaultfd.rst, "Creating a userfaultfd".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// By `/dev/userfaultfd` (Linux 6.1), whose permissions say who may.
    Device,
    /// By the system call, which `CAP_SYS_PTRACE` allows, or the sysctl
    /// `vm.unprivileged_userfaultfd`.
    SystemCall,
}

/// What this host's userfaultfd can do, found out by trying.
#[derive(Clone, Debug)]
pub struct Probe {
    /// How this process comes by one.
    pub access: Access,
    /// The features that the kernel says it has.
    pub features: Features,
    /// Traps missing pages of shared memory.
    pub missing_shmem: Answer,
    /// Traps unmapped pages of shared memory.
    pub minor_shmem: Answer,
    /// Traps missing pages of huge-page memory.
    pub missing_hugetlbfs: Answer,
    /// Traps unmapped pages of huge-page memory.
    pub minor_hugetlbfs: Answer,
    /// Tells the very address that was touched.
    pub exact_address: Answer,
}

impl Probe {
    /// Whether memory of this kind can be demand-paged: missing and unmapped pages are trapped.
    pub fn can_page(&self, kind: BackingKind) -> bool {
        if kind == BackingKind::Shmem {
            self.missing_shmem.is_yes() && self.minor_shmem.is_yes()
        } else {
            self.missing_hugetlbfs.is_yes() && self.minor_hugetlbfs.is_yes()
        }
    }

    /// What was tried, feature by feature.
    pub fn answers(&self) -> [(Features, &Answer); 5] {
        [
            (Features::MISSING_SHMEM, &self.missing_shmem),
            (Features::MINOR_SHMEM, &self.minor_shmem),
            (Features::MISSING_HUGETLBFS, &self.missing_hugetlbfs),
            (Features::MINOR_HUGETLBFS, &self.minor_hugetlbfs),
            (Features::EXACT_ADDRESS, &self.exact_address),
        ]
    }
}

/// Tries what this host's userfaultfd can do. It needs no huge pages to tell what would work on
/// them.
///
/// # Errors
///
/// [`OpenError`] if this process may not have one at all.
///
/// # Examples
///
/// ```
/// use demand_memory::BackingKind;
///
/// match demand_uffd::probe() {
///     Ok(probe) if probe.can_page(BackingKind::Shmem) => println!("{}", probe.features),
///     Ok(probe) => println!("MINOR on shared memory: {}", probe.minor_shmem),
///     Err(error) => println!("{error}"),
/// }
/// ```
pub fn probe() -> Result<Probe, OpenError> {
    let (features, access) = Userfaultfd::ask()?;
    let answer = |feature: Features, kind: BackingKind, modes: Modes| {
        if !features.contains(feature) {
            return Answer::No(format!("the kernel lacks {feature}"));
        }
        match try_register(kind, feature, modes) {
            Ok(()) => Answer::Yes,
            Err(why) => Answer::No(why),
        }
    };
    let (shmem, huge) = (BackingKind::Shmem, BackingKind::Hugetlb2M);
    Ok(Probe {
        access,
        features,
        missing_shmem: answer(Features::MISSING_SHMEM, shmem, Modes::MISSING),
        minor_shmem: answer(Features::MINOR_SHMEM, shmem, Modes::ALL),
        missing_hugetlbfs: answer(Features::MISSING_HUGETLBFS, huge, Modes::MISSING),
        minor_hugetlbfs: answer(Features::MINOR_HUGETLBFS, huge, Modes::ALL),
        exact_address: answer(Features::EXACT_ADDRESS, shmem, Modes::MISSING),
    })
}

fn try_register(kind: BackingKind, feature: Features, modes: Modes) -> Result<(), String> {
    let uffd = Userfaultfd::open(feature).map_err(|error| error.to_string())?;
    // Nothing is reserved: an empty pool does not matter to what is asked here.
    let backing = MemfdBacking::new(kind, kind.unit(), false).map_err(|error| error.to_string())?;
    let mapping = backing.map().map_err(|error| error.to_string())?;
    uffd.register(mapping.address().as_ptr() as u64, mapping.len(), modes)
        .map_err(|error| error.to_string())
}
