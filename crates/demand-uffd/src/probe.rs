// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the userfaultfd capabilities of this host by trying them.

use std::error::Error;
use std::fmt;

use demand_memory::{Backing, BackingKind, MemfdBacking};

use crate::open::{Access, Accesses, kernel_features, open};
use crate::{Features, Modes, OpenError, Userfaultfd};

/// Whether a capability works on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It works.
    Yes,
    /// It does not work; the reason, on one line.
    No(String),
}

impl Answer {
    /// Returns whether it works.
    pub(crate) fn is_yes(&self) -> bool {
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

/// The userfaultfd capabilities of this host, found by trying them.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The way in which this process opens a userfaultfd.
    pub access: Access,
    /// The features that the kernel reports.
    pub features: Features,
    /// Whether missing pages of shared memory are trapped.
    pub missing_shmem: Answer,
    /// Whether unmapped pages of shared memory are trapped.
    pub minor_shmem: Answer,
    /// Whether missing pages of huge-page memory are trapped.
    pub missing_hugetlbfs: Answer,
    /// Whether unmapped pages of huge-page memory are trapped.
    pub minor_hugetlbfs: Answer,
    /// Whether faults report the exact address that was touched.
    pub exact_address: Answer,
}

impl Probe {
    /// Returns whether memory of this kind can be demand-paged: missing and unmapped pages are
    /// trapped.
    pub fn can_page(&self, kind: BackingKind) -> bool {
        kind.traps_in_mappings()
            && if kind.is_hugetlb() {
                self.missing_hugetlbfs.is_yes() && self.minor_hugetlbfs.is_yes()
            } else {
                self.missing_shmem.is_yes() && self.minor_shmem.is_yes()
            }
    }

    /// Returns the features that were tried, with the outcomes.
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

/// Tests the userfaultfd capabilities of this host. It needs no huge pages to test those for huge
/// pages.
///
/// # Errors
///
/// [`OpenError`] if this process may not open a userfaultfd at all.
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
    probe_accesses(Accesses::All)
}

/// Like [`probe`], but tests what this process can do with a userfaultfd that traps accesses of
/// user-mode code only, which needs no permission: see [`Userfaultfd::open_user_mode`]. The answers
/// do not hold for guests.
///
/// # Errors
///
/// [`OpenError`] if the kernel or a seccomp filter refuses such a userfaultfd.
pub fn probe_user_mode() -> Result<Probe, OpenError> {
    probe_accesses(Accesses::UserMode)
}

fn probe_accesses(accesses: Accesses) -> Result<Probe, OpenError> {
    let (features, access) = kernel_features(accesses)?;
    let answer = |feature: Features, kind: BackingKind, modes: Modes| {
        if !features.contains(feature) {
            return Answer::No(format!("the kernel lacks {feature}"));
        }
        match try_register(kind, feature, modes, accesses) {
            Ok(()) => Answer::Yes,
            Err(why) => Answer::No(why.to_string()),
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

fn try_register(
    kind: BackingKind,
    feature: Features,
    modes: Modes,
    accesses: Accesses,
) -> Result<(), Box<dyn Error>> {
    let uffd = Userfaultfd::of(open(feature, accesses)?.0);
    // Reserves nothing: the test works even if the pool is empty.
    let backing = MemfdBacking::new(kind, kind.unit())?.with_reservation(false);
    let mapping = backing.map()?;
    uffd.register(mapping.address().as_ptr() as u64, mapping.len(), modes)?;
    Ok(())
}
