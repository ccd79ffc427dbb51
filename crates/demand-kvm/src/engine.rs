// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a guest's access to a missing page is caught.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{KvmError, Probe, Userfault};

/// A way to catch a guest's access to a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Engine {
    /// KVM reads the missing bitmap and returns from `KVM_RUN` on the vCPU's thread: 4096 bytes
    /// at a time on any backing. Needs a kernel with the KVM Userfault series.
    KvmUserfault,
    /// userfaultfd on the guest's mapping, served by another thread: one unit of the backing at a
    /// time. Works with any kernel; to KVM the memslot is like any other.
    Uffd,
}

impl Engine {
    /// All engines, the best first.
    pub const ALL: [Engine; 2] = [Engine::KvmUserfault, Engine::Uffd];

    /// The engine's name on command lines and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Engine::KvmUserfault => "kvm-userfault",
            Engine::Uffd => "uffd",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the user asked for.
///
/// # Examples
///
/// ```
/// use demand_kvm::{Engine, EngineChoice};
///
/// assert_eq!("auto".parse(), Ok(EngineChoice::Auto));
/// assert_eq!("uffd".parse(), Ok(EngineChoice::Only(Engine::Uffd)));
/// let error = "vmexit".parse::<EngineChoice>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "there is no engine 'vmexit'; choose one of auto, kvm-userfault, uffd"
/// );
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineChoice {
    /// The best engine that the host has.
    #[default]
    Auto,
    /// This engine or none.
    Only(Engine),
}

impl EngineChoice {
    const AUTO: &'static str = "auto";

    /// The choice's name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            EngineChoice::Auto => EngineChoice::AUTO,
            EngineChoice::Only(engine) => engine.name(),
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no engine of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no engine '{0}'; choose one of {names}", names = names())]
pub struct UnknownEngine(pub String);

fn names() -> String {
    let engines = Engine::ALL.map(Engine::name).join(", ");
    format!("{}, {engines}", EngineChoice::AUTO)
}

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        if name == EngineChoice::AUTO {
            return Ok(EngineChoice::Auto);
        }
        let engine = Engine::ALL.into_iter().find(|engine| engine.name() == name);
        engine.map(EngineChoice::Only).ok_or_else(|| UnknownEngine(name.to_owned()))
    }
}

/// Why no engine could be chosen: this host cannot do what was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// There is no KVM to run a guest with.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host lacks the engine that was asked for by name.
    #[error(
        "use engine {}: {userfault}; choose engine uffd or auto, or boot a kernel with the KVM \
         Userfault series",
        Engine::KvmUserfault
    )]
    NoUserfault {
        /// What KVM did when it was tried.
        userfault: Userfault,
    },
}

/// The engine to use: the one that was asked for, or with [`EngineChoice::Auto`] the best that
/// the host has. [`Engine::Uffd`] is always to be had as far as KVM is concerned; whether the
/// host gives userfaultfds to this user is for those to say who open them.
///
/// # Errors
///
/// [`EngineError`] if the host has no usable KVM, or not the engine that was asked for.
///
/// # Examples
///
/// ```
/// use demand_kvm::{Engine, EngineChoice, probe, resolve};
///
/// let probe = probe();
/// match resolve(EngineChoice::Auto, &probe) {
///     Ok(engine) => println!("pages are caught by {engine}"),
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
pub fn resolve(choice: EngineChoice, probe: &Probe) -> Result<Engine, EngineError> {
    let features = probe.kvm.as_ref().map_err(Clone::clone)?;
    let userfault = features.userfault;
    match choice {
        EngineChoice::Only(Engine::KvmUserfault) if !userfault.works() => {
            Err(EngineError::NoUserfault { userfault })
        }
        EngineChoice::Only(engine) => Ok(engine),
        EngineChoice::Auto if userfault.works() => Ok(Engine::KvmUserfault),
        EngineChoice::Auto => Ok(Engine::Uffd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvmFeatures, Virtualization};

    fn host(userfault: Userfault) -> Probe {
        let kvm = Ok(KvmFeatures { userfault, ..KvmFeatures::default() });
        Probe { virtualization: Virtualization::Svm, kvm }
    }

    const REFUSED: Userfault = Userfault::Refused { errno: libc::EINVAL };

    #[test]
    fn names_are_read_back() {
        let choices = Engine::ALL.map(EngineChoice::Only);
        for choice in choices.into_iter().chain([EngineChoice::Auto]) {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("kvm-attributes".parse::<EngineChoice>().is_err());
    }

    #[test]
    fn auto_takes_the_best_there_is() {
        assert_eq!(resolve(EngineChoice::Auto, &host(Userfault::Works)), Ok(Engine::KvmUserfault));
        assert_eq!(resolve(EngineChoice::Auto, &host(REFUSED)), Ok(Engine::Uffd));
        assert_eq!(resolve(EngineChoice::Auto, &host(Userfault::Ignored)), Ok(Engine::Uffd));
    }

    #[test]
    fn an_engine_asked_for_by_name_is_never_replaced() {
        let only = |engine| EngineChoice::Only(engine);
        assert_eq!(resolve(only(Engine::Uffd), &host(Userfault::Works)), Ok(Engine::Uffd));
        let error = resolve(only(Engine::KvmUserfault), &host(REFUSED)).unwrap_err();
        assert_eq!(error, EngineError::NoUserfault { userfault: REFUSED });
        let text = error.to_string();
        assert!(text.contains("Invalid argument") && text.contains("choose engine uffd"), "{text}");
    }

    #[test]
    fn without_kvm_there_is_no_engine() {
        let error = KvmError::NotThere(kvm_ioctls::Error::new(libc::ENOENT));
        let probe = Probe { virtualization: Virtualization::Svm, kvm: Err(error.clone()) };
        assert_eq!(resolve(EngineChoice::Auto, &probe), Err(EngineError::Kvm(error)));
    }
}
