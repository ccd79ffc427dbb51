// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM features and usable engines of this host.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};

use serde::{Serialize, Serializer};

use crate::features::{Scope, Trials};
use crate::scratch::Ending;
use crate::{Engine, EngineChoice, KvmError, KvmFeatures, Trial, open_kvm};

/// The virtualization technology of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Virtualization {
    /// Intel's VMX.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// Neither: KVM, if the host has one, emulates the guest's instructions or is paravirtual,
    /// which is slow and may not run an unmodified guest.
    Emulated,
    /// Unknown: /proc/cpuinfo cannot be read, or this is not x86.
    Unknown,
}

impl Virtualization {
    /// Returns the technology of this host, as /proc/cpuinfo names it. Unlike [`probe`], this tries
    /// nothing.
    pub fn of_host() -> Self {
        if !cfg!(target_arch = "x86_64") {
            return Virtualization::Unknown;
        }
        // All processors have the same, and the kernel writes the file as it is read.
        let Ok(cpuinfo) = File::open("/proc/cpuinfo") else { return Virtualization::Unknown };
        virtualization_of(BufReader::new(cpuinfo).lines().map_while(Result::ok))
    }
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Virtualization::Vmx => "Intel VMX",
            Virtualization::Svm => "AMD SVM",
            Virtualization::Emulated => "an emulating KVM: the processor has neither vmx nor svm",
            Virtualization::Unknown => "unknown",
        })
    }
}

/// An engine, whether this host has it, and the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct EngineReport {
    /// The engine.
    pub engine: Engine,
    /// Whether KVM supports it.
    pub usable: bool,
    /// The reason.
    pub why: String,
}

/// The capabilities of this host. Serialized, it is a flat object: `virtualization`, `usable`,
/// `error` (if there is no usable KVM), the fields of [`KvmFeatures`] (if there is), and `engines`.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// The virtualization technology.
    pub virtualization: Virtualization,
    /// KVM's features, or the reason that it cannot be used.
    pub kvm: Result<KvmFeatures, KvmError>,
}

impl Probe {
    /// Returns a report on each engine, in order of preference.
    pub fn engines(&self) -> Vec<EngineReport> {
        let report = |engine| {
            let (usable, why) = match (&self.kvm, engine) {
                (Err(error), _) => (false, error.to_string()),
                (Ok(_), Engine::Uffd) => (true, "it needs no support from KVM".to_owned()),
                (Ok(kvm), engine) => {
                    let trial = self.trial(kvm, engine);
                    (trial.works(), trial.describe(engine))
                }
            };
            EngineReport { engine, usable, why }
        };
        Engine::ALL.map(report).into()
    }

    /// Returns the outcome of trying an engine.
    pub(crate) fn trial(&self, kvm: &KvmFeatures, engine: Engine) -> Trial {
        // An emulator's accesses are KVM's own, which fail at markers.
        let emulates = self.virtualization == Virtualization::Emulated;
        if emulates && engine == Engine::UffdPoison { Trial::Ignored } else { kvm.trial(engine) }
    }

    /// Returns whether the engine itself traps every access to a missing page on this host, KVM's
    /// own included, so that the guest's mapping need not be armed.
    pub fn traps_own_accesses(&self, engine: Engine) -> bool {
        engine == Engine::KvmUserfault && self.kvm.as_ref().is_ok_and(|kvm| kvm.own_accesses)
    }

    /// Returns whether nested virtualization must be hidden from a guest while pages are missing
    /// ([`hide_nested`](crate::hide_nested)). For a nested guest KVM prefetches missing pages and
    /// reads structures that the guest names, unless it is known to respect the bitmap in all of
    /// these accesses, which it is on SVM only. Under [`Engine::Uffd`] the armed mapping traps them
    /// all.
    pub fn hides_nested(&self, engine: Engine) -> bool {
        match engine {
            Engine::KvmUserfault => {
                !self.traps_own_accesses(engine) || self.virtualization != Virtualization::Svm
            }
            Engine::KvmAttributes | Engine::UffdPoison => true,
            Engine::Uffd => false,
        }
    }

    /// Returns the limits of this engine on this host: sentences, without full stops.
    pub fn limits(&self, engine: Engine) -> Vec<&'static str> {
        let mut limits = Vec::new();
        if engine == Engine::KvmAttributes {
            limits.push(
                "kvm-attributes is experimental: the kernel provides this type of VM for \
                 development and testing, set-up takes a step for each page, and read-only \
                 memslots may be refused",
            );
        }
        if engine == Engine::UffdPoison {
            limits.push(
                "uffd-poison is chosen only by name: where KVM emulates an instruction and alone \
                 walks a missing page of the guest's page tables, the guest gets a page fault that \
                 it did not cause",
            );
        }
        let by_kvm = matches!(engine, Engine::KvmUserfault | Engine::KvmAttributes);
        if by_kvm && !self.traps_own_accesses(engine) {
            limits.push(
                "on huge pages, this kernel does not stop KVM's own accesses to a partly populated \
                 unit (operands of instructions that it emulates, walks of the guest's page \
                 tables); pages that MSRs name are fetched in advance",
            );
        }
        if self.hides_nested(engine) {
            limits.push(
                "nested virtualization (SVM, VMX) is hidden from guests while pages are missing: \
                 this host's KVM may access missing pages for nested guests",
            );
        }
        limits
    }
}

impl Serialize for Probe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            virtualization: Virtualization,
            usable: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<String>,
            #[serde(flatten)]
            features: Option<&'a KvmFeatures>,
            engines: Vec<EngineReport>,
        }
        let Probe { virtualization, kvm } = self;
        let flat = Flat {
            virtualization: *virtualization,
            usable: kvm.is_ok(),
            error: kvm.as_ref().err().map(ToString::to_string),
            features: kvm.as_ref().ok(),
            engines: self.engines(),
        };
        flat.serialize(serializer)
    }
}

/// Tests all capabilities of this host, now. It tries the engines on scratch VMs, which takes some
/// tens of milliseconds. A start needs less: [`probe_for`], or a [`ProbeCache`](crate::ProbeCache).
///
/// # Examples
///
/// ```
/// for report in demand_kvm::probe().engines() {
///     println!("{}: {}", report.engine, report.why);
/// }
/// ```
pub fn probe() -> Probe {
    let mut trials = Trials::default();
    probe_with(&mut trials, Scope::ALL, Ending::Here)
}

/// Tests the capabilities of this host on which [`resolve`](crate::resolve) depends for this
/// choice: an engine that is named is tried alone, and [`Engine::Uffd`] needs no trial. Engines
/// that were not tried are [`Trial::Untried`](crate::Trial::Untried) in the result.
///
/// The scratch VM is closed on a thread that ends by itself, because KVM takes some milliseconds to
/// close it.
///
/// # Examples
///
/// ```
/// use demand_kvm::{Engine, EngineChoice, probe_for, resolve};
///
/// let choice = EngineChoice::Only(Engine::Uffd);
/// match resolve(choice, &probe_for(choice)) {
///     Ok(engine) => assert_eq!(engine, Engine::Uffd),
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
pub fn probe_for(choice: EngineChoice) -> Probe {
    probe_with(&mut Trials::default(), Scope::of(choice), Ending::Beside)
}

/// Probes, with `trials` as known outcomes, and adds to them.
pub(crate) fn probe_with(trials: &mut Trials, scope: Scope, ending: Ending) -> Probe {
    let kvm = open_kvm().and_then(|kvm| {
        trials.complete(&kvm, scope, ending)?;
        Ok(KvmFeatures::of(&kvm, *trials))
    });
    Probe { virtualization: Virtualization::of_host(), kvm }
}

fn virtualization_of(mut cpuinfo: impl Iterator<Item = String>) -> Virtualization {
    let Some(flags) = cpuinfo.find(|line| line.starts_with("flags")) else {
        return Virtualization::Unknown;
    };
    let has = |name| flags.split_whitespace().any(|flag| flag == name);
    match (has("vmx"), has("svm")) {
        (true, _) => Virtualization::Vmx,
        (_, true) => Virtualization::Svm,
        _ => Virtualization::Emulated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use test_support::host::is_lab;

    #[test]
    fn flags_are_whole_words() {
        let of = |flags: &str| {
            let lines = ["processor\t: 0", &format!("flags\t\t: {flags}"), "bugs\t: svm"];
            virtualization_of(lines.map(String::from).into_iter())
        };
        assert_eq!(of("fpu vmx"), Virtualization::Vmx);
        assert_eq!(of("svm fpu"), Virtualization::Svm);
        assert_eq!(of("fpu svm_lock"), Virtualization::Emulated);
        assert_eq!(virtualization_of(std::iter::empty()), Virtualization::Unknown);
    }

    #[test]
    fn nested_virtualization_is_hidden_unless_known_correct() {
        let probe = |virtualization, own_accesses| {
            let kvm = crate::KvmFeatures { own_accesses, ..Default::default() };
            Probe { virtualization, kvm: Ok(kvm) }
        };
        let (svm, vmx) = (Virtualization::Svm, Virtualization::Vmx);
        assert!(!probe(svm, true).hides_nested(Engine::KvmUserfault));
        assert!(probe(svm, false).hides_nested(Engine::KvmUserfault));
        assert!(probe(vmx, true).hides_nested(Engine::KvmUserfault));
        for (virtualization, right) in [(svm, true), (vmx, false)] {
            assert!(probe(virtualization, right).hides_nested(Engine::KvmAttributes));
            assert!(!probe(virtualization, right).hides_nested(Engine::Uffd));
        }
        let limits = |right, engine| probe(svm, right).limits(engine).len();
        assert_eq!(limits(true, Engine::KvmUserfault), 0);
        assert_eq!(limits(false, Engine::KvmUserfault), 2);
        assert_eq!(limits(true, Engine::KvmAttributes), 3);
        assert_eq!(limits(false, Engine::Uffd), 0);
    }

    #[test]
    fn this_host_is_described() {
        let probe = probe();
        let json = serde_json::to_value(&probe).unwrap();
        assert_eq!(json["engines"][0]["engine"], "kvm-userfault");
        assert_eq!(json["usable"], probe.kvm.is_ok());
        match &probe.kvm {
            Ok(kvm) => {
                assert_eq!(json["api_version"], 12);
                assert_ne!(kvm.userfault, Trial::Untried, "{probe:?}");
                assert_ne!(kvm.attributes, Trial::Untried, "{probe:?}");
                assert!(!kvm.own_accesses || kvm.userfault.works(), "{probe:?}");
                if is_lab() {
                    assert!(kvm.userfault.works() && kvm.attributes.works(), "{probe:?}");
                }
                assert_eq!(json["engines"][1]["usable"], true);
            }
            Err(error) => assert_eq!(json["error"], error.to_string()),
        }
        println!("{json:#}");
    }
}
