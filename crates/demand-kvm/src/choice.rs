// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The choice of an engine, by name or by what the host can do.

use std::fmt;
use std::str::FromStr;

use crate::{Engine, KvmError, Probe, Trial};

/// The engine that the user asked for.
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
///     "unknown engine 'vmexit'; choose one of auto, kvm-userfault, uffd, uffd-poison, \
///      kvm-attributes"
/// );
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineChoice {
    /// The best engine that the host has.
    #[default]
    Auto,
    /// This engine, or an error.
    Only(Engine),
}

impl EngineChoice {
    const AUTO: &'static str = "auto";

    /// Returns the choice's name.
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

/// The error from parsing a text that is not the name of an [`EngineChoice`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown engine '{name}'; choose one of {}", names())]
pub struct ParseEngineChoiceError {
    name: String,
}

fn names() -> String {
    let engines = Engine::ALL.map(Engine::name).join(", ");
    format!("{}, {engines}", EngineChoice::AUTO)
}

impl FromStr for EngineChoice {
    type Err = ParseEngineChoiceError;

    fn from_str(name: &str) -> Result<Self, ParseEngineChoiceError> {
        if name == EngineChoice::AUTO {
            return Ok(EngineChoice::Auto);
        }
        let engine = Engine::ALL.into_iter().find(|engine| engine.name() == name);
        engine.map(EngineChoice::Only).ok_or_else(|| ParseEngineChoiceError { name: name.into() })
    }
}

/// Errors from choosing an engine: this host cannot run the one that was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The host has no usable KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host lacks the engine that the user named.
    #[error(
        "cannot use engine {engine}: {}; {}",
        .trial.describe(*.engine),
        remedy(*.engine)
    )]
    Unsupported {
        /// The engine.
        engine: Engine,
        /// The outcome of trying it.
        trial: Trial,
    },
}

fn remedy(engine: Engine) -> &'static str {
    match engine {
        Engine::KvmAttributes => "boot a kernel with CONFIG_KVM_SW_PROTECTED_VM and nested paging",
        Engine::UffdPoison => "use another engine, or a processor with VMX or SVM",
        Engine::KvmUserfault | Engine::Uffd => "boot a kernel with the KVM Userfault series",
    }
}

/// Chooses the engine: the one that the user named, or with [`EngineChoice::Auto`] the best that
/// the host has, which is never [`Engine::KvmAttributes`]. KVM always supports [`Engine::Uffd`];
/// whether this user may open a userfaultfd is checked only when one is opened.
///
/// # Errors
///
/// [`EngineError`] if the host has no usable KVM or lacks the engine that was asked for.
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
    match choice {
        EngineChoice::Only(engine) => match probe.trial(features, engine) {
            Trial::Works => Ok(engine),
            trial => Err(EngineError::Unsupported { engine, trial }),
        },
        EngineChoice::Auto if features.userfault.works() => Ok(Engine::KvmUserfault),
        EngineChoice::Auto => Ok(Engine::Uffd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvmFeatures, Virtualization};

    fn host(userfault: Trial, attributes: Trial) -> Probe {
        let kvm = Ok(KvmFeatures { userfault, attributes, ..KvmFeatures::default() });
        Probe { virtualization: Virtualization::Svm, kvm }
    }

    const REFUSED: Trial = Trial::Refused { errno: libc::EINVAL };

    #[test]
    fn names_are_read_back() {
        let choices = Engine::ALL.map(EngineChoice::Only);
        for choice in choices.into_iter().chain([EngineChoice::Auto]) {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("attributes".parse::<EngineChoice>().is_err());
    }

    #[test]
    fn auto_takes_the_best_available_engine() {
        for (userfault, best) in [
            (Trial::Works, Engine::KvmUserfault),
            (REFUSED, Engine::Uffd),
            (Trial::Ignored, Engine::Uffd),
        ] {
            // Never the experimental engine, whether the host has it or not.
            for attributes in [Trial::Works, REFUSED] {
                assert_eq!(resolve(EngineChoice::Auto, &host(userfault, attributes)), Ok(best));
            }
        }
    }

    #[test]
    fn named_engine_is_never_replaced() {
        let only = |engine| EngineChoice::Only(engine);
        let all = host(Trial::Works, Trial::Works);
        for engine in Engine::ALL {
            assert_eq!(resolve(only(engine), &all), Ok(engine));
        }
        for (engine, needs) in [
            (Engine::KvmUserfault, "KVM Userfault series"),
            (Engine::KvmAttributes, "CONFIG_KVM_SW_PROTECTED_VM"),
        ] {
            let error = resolve(only(engine), &host(REFUSED, REFUSED)).unwrap_err();
            assert_eq!(error, EngineError::Unsupported { engine, trial: REFUSED });
            let text = error.to_string();
            for part in ["Invalid argument", needs, engine.name()] {
                assert!(text.contains(part) && !text.contains('\n'), "{text}");
            }
        }
    }

    #[test]
    fn without_kvm_there_is_no_engine() {
        let error = KvmError::Absent(kvm_ioctls::Error::new(libc::ENOENT));
        let probe = Probe { virtualization: Virtualization::Svm, kvm: Err(error.clone()) };
        assert_eq!(resolve(EngineChoice::Auto, &probe), Err(EngineError::Kvm(error)));
    }
}
