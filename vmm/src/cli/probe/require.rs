// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm probe --require`: checks for scripts whether a host has what they need.

use std::str::FromStr;

use demand_kvm::{Engine, EngineChoice};
use demand_memory::BackingKind;
use serde::Serialize;

use crate::cli::probe::{Answer, Report};

/// A capability that a host may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A KVM that this user may use.
    Kvm,
    /// Linux guests, booted or restored with all of their memory.
    Linux,
    /// Guests that run before their memory has arrived.
    Lazy,
    /// A userfaultfd that serves the kernel's faults as well.
    Userfaultfd,
    /// vhost-user back-ends that wait for missing pages.
    Postcopy,
    /// Transparent huge pages for shared memory.
    Thp,
    /// An engine, under which guests run before their memory has arrived.
    Engine(Engine),
    /// Free memory of this kind.
    Backing(BackingKind),
}

/// The needs without a name of their own elsewhere.
const NAMED: [(&str, Need); 6] = [
    ("kvm", Need::Kvm),
    ("linux", Need::Linux),
    ("lazy", Need::Lazy),
    ("userfaultfd", Need::Userfaultfd),
    ("postcopy", Need::Postcopy),
    ("thp", Need::Thp),
];

impl Need {
    /// Returns the need's name on the command line.
    fn name(self) -> &'static str {
        match self {
            Need::Engine(engine) => engine.name(),
            Need::Backing(kind) => kind.name(),
            named => NAMED.iter().find(|(_, need)| *need == named).map_or("", |(name, _)| name),
        }
    }

    /// Returns the names of all needs.
    fn names() -> String {
        let named = NAMED.map(|(name, _)| name).into_iter();
        let engines = Engine::ALL.into_iter().map(Engine::name);
        let backings = BackingKind::ALL.into_iter().map(BackingKind::name);
        named.chain(engines).chain(backings).collect::<Vec<_>>().join(", ")
    }
}

/// The error from parsing a text that names no capability.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown capability '{name}'; choose among {}", Need::names())]
pub(crate) struct ParseNeedError {
    name: String,
}

impl FromStr for Need {
    type Err = ParseNeedError;

    fn from_str(name: &str) -> Result<Self, ParseNeedError> {
        let named = NAMED.iter().find(|(known, _)| *known == name).map(|(_, need)| *need);
        let engine = || match name.parse() {
            Ok(EngineChoice::Only(engine)) => Some(Need::Engine(engine)),
            _ => None,
        };
        let backing = || name.parse().ok().map(Need::Backing);
        named.or_else(engine).or_else(backing).ok_or_else(|| ParseNeedError { name: name.into() })
    }
}

/// A need, and whether the host meets it.
#[derive(Serialize)]
pub(super) struct Met {
    pub(super) name: &'static str,
    #[serde(flatten)]
    pub(super) answer: Answer,
}

/// Returns whether the host meets a need.
pub(super) fn meet(report: &Report, need: Need) -> Met {
    let answer = |usable: bool, why: String| Answer { usable, why };
    let uffd = &report.userfaultfd;
    let userfaultfd = || answer(uffd.usable, uffd.error.clone().unwrap_or_default());
    let answer = match need {
        Need::Kvm => match &report.kvm.kvm {
            Ok(_) => answer(true, report.kvm.virtualization.to_string()),
            Err(error) => answer(false, error.to_string()),
        },
        Need::Linux => report.linux_guests.clone(),
        Need::Lazy => report.lazy.clone(),
        Need::Userfaultfd => userfaultfd(),
        // The back-end opens another one, as the user that it runs as.
        // Other ways to a userfaultfd would not help it.
        Need::Postcopy if !uffd.usable && super::is_device_closed() => {
            super::back_end_userfaultfd(uffd.access)
        }
        Need::Postcopy => match (&report.traps_shmem, &report.auto) {
            (Err(why), _) => answer(false, why.clone()),
            (Ok(()), None) => answer(false, report.auto_why.clone()),
            (Ok(()), Some(_)) if uffd.usable => super::back_end_userfaultfd(uffd.access),
            (Ok(()), Some(_)) => userfaultfd(),
        },
        Need::Thp => report.transparent_huge_pages.clone(),
        Need::Engine(Engine::UffdPoison) => report.markers.clone(),
        Need::Engine(engine) => {
            let engines = report.kvm.engines();
            let found = engines.into_iter().find(|found| found.engine == engine);
            match (found, &report.traps_shmem) {
                (Some(found), Err(why))
                    if found.usable && !super::can_arm(&report.kvm, engine, false) =>
                {
                    answer(false, why.clone())
                }
                (Some(found), _) => answer(found.usable, found.why),
                (None, _) => answer(false, "it is unknown".into()),
            }
        }
        Need::Backing(kind) => {
            let found = report.backings.iter().find(|backing| backing.name == kind.name());
            let free = found.and_then(|backing| backing.free_units);
            let of_vm = found.and_then(|backing| backing.guest_memfd.clone());
            match (kind, free) {
                (BackingKind::GuestMemfd, _) => {
                    of_vm.unwrap_or_else(|| answer(false, "it is unknown".into()))
                }
                (BackingKind::Shmem, _) => answer(true, "ordinary memory".into()),
                (_, Some(free)) if free > 0 => answer(true, format!("{free} pages are free")),
                _ => answer(false, format!("no page is free; {}", pool(kind))),
            }
        }
    };
    Met { name: need.name(), answer }
}

fn pool(kind: BackingKind) -> &'static str {
    match kind {
        BackingKind::Hugetlb1G => {
            "write to hugepages-1048576kB/nr_hugepages in /sys/kernel/mm/hugepages"
        }
        _ => "raise vm.nr_hugepages",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_need_has_its_name() {
        for name in Need::names().split(", ") {
            assert_eq!(name.parse::<Need>().unwrap().name(), name);
        }
        for name in ["", "auto", "magic"] {
            let error = name.parse::<Need>().unwrap_err().to_string();
            assert!(error.contains("kvm, linux, lazy") && error.contains("hugetlb-2m"), "{error}");
        }
    }
}
