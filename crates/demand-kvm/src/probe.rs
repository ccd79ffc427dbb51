// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM features and usable engines of this host.

use std::fmt;
use std::fs;

use serde::{Serialize, Serializer};

use crate::{Engine, KvmError, KvmFeatures, open_kvm};

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
                    let trial = kvm.trial(engine);
                    (trial.works(), trial.describe(engine))
                }
            };
            EngineReport { engine, usable, why }
        };
        Engine::ALL.map(report).into()
    }

    /// Returns whether nested virtualization must be hidden from a guest while pages are missing
    /// ([`hide_nested`](crate::hide_nested)). For a nested guest KVM prefetches missing pages and
    /// reads structures that the guest names, unless it is known to respect the bitmap in all of
    /// these accesses, which it is on SVM only. Under [`Engine::Uffd`] the armed mapping traps them
    /// all.
    pub fn hides_nested(&self, engine: Engine) -> bool {
        let right = self.kvm.as_ref().is_ok_and(|kvm| kvm.own_accesses);
        match engine {
            Engine::KvmUserfault => !right || self.virtualization != Virtualization::Svm,
            Engine::KvmAttributes => true,
            Engine::Uffd => false,
        }
    }

    /// Returns the limits of this engine on this host: sentences, without full stops.
    pub fn limits(&self, engine: Engine) -> Vec<&'static str> {
        let known = self.kvm.as_ref().ok();
        let right = known.is_some_and(|kvm| engine == Engine::KvmUserfault && kvm.own_accesses);
        let mut limits = Vec::new();
        if engine == Engine::KvmAttributes {
            limits.push(
                "kvm-attributes is experimental: the kernel provides this type of VM for \
                 development and testing, set-up takes a step for each page, and read-only \
                 memslots may be refused",
            );
        }
        if engine != Engine::Uffd && !right {
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

/// Tests the capabilities of this host. It tries the engines on scratch VMs, which takes some
/// milliseconds.
///
/// # Examples
///
/// ```
/// for report in demand_kvm::probe().engines() {
///     println!("{}: {}", report.engine, report.why);
/// }
/// ```
pub fn probe() -> Probe {
    Probe {
        virtualization: virtualization(),
        kvm: open_kvm().and_then(|kvm| KvmFeatures::of(&kvm)),
    }
}

fn virtualization() -> Virtualization {
    if !cfg!(target_arch = "x86_64") {
        return Virtualization::Unknown;
    }
    fs::read_to_string("/proc/cpuinfo")
        .map_or(Virtualization::Unknown, |cpuinfo| virtualization_of(&cpuinfo))
}

fn virtualization_of(cpuinfo: &str) -> Virtualization {
    let Some(flags) = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")) else {
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
    use crate::Trial;
    use test_support::host::is_lab;

    #[test]
    fn flags_are_whole_words() {
        let cpuinfo = |flags: &str| format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t: svm\n");
        assert_eq!(virtualization_of(&cpuinfo("fpu vmx")), Virtualization::Vmx);
        assert_eq!(virtualization_of(&cpuinfo("svm fpu")), Virtualization::Svm);
        assert_eq!(virtualization_of(&cpuinfo("fpu svm_lock")), Virtualization::Emulated);
        assert_eq!(virtualization_of(""), Virtualization::Unknown);
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
