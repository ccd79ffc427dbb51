// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm probe`: the capabilities of this host, the reasons, and steps to improve them.

pub(crate) mod require;

use std::fmt::Write;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;

use demand_kvm::{Engine, EngineChoice, GUEST_MEMFD_LIMITS, Trial, Virtualization, resolve};
use demand_memory::{BackingKind, HugePagePool, transparent_huge_pages_of_shmem};
use demand_uffd::{Access, OpenError};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::advice::{Advice, Found, advice};
use crate::cli::error::CliError;
use crate::cli::output::{print, to_json};
use crate::cli::probe::require::{Met, Need, meet};
use crate::error::Error;
use crate::logger;
use crate::report::size;
use crate::vm::kept_probes::kept_probes;
use crate::vm::linux;

#[derive(Serialize)]
struct Report {
    #[serde(skip)]
    kvm: demand_kvm::Probe,
    /// KVM's part, in which an engine is usable only if guests can run under it.
    #[serde(rename = "kvm")]
    kvm_as_json: Value,
    userfaultfd: Userfaultfd,
    backings: Vec<BackingReport>,
    transparent_huge_pages: Answer,
    linux_guests: Answer,
    /// Guests that run before their memory has arrived.
    lazy: Answer,
    /// The reason for which userfaultfd does not trap all accesses to shared memory.
    #[serde(skip)]
    traps_shmem: Result<(), String>,
    /// Whether KVM stops a vCPU at the markers of a userfaultfd (engine `uffd-poison`).
    markers: Answer,
    /// The engine that `auto` chooses; absent if no engine works.
    auto: Option<String>,
    /// The reason for that choice.
    auto_why: String,
    /// The limits of this host.
    limits: Vec<String>,
    /// The recommended changes.
    advice: Vec<Advice>,
    /// The capabilities that the user requires.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    required: Vec<Met>,
}

#[derive(Serialize)]
struct Userfaultfd {
    usable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The way in which this process opens a userfaultfd: `device` or `system-call`.
    access: Option<&'static str>,
    /// The sysctl `vm.unprivileged_userfaultfd`; absent where the kernel has none.
    unprivileged: Option<u64>,
    /// The kernel's names of all its features.
    features: Vec<String>,
    /// Features that were tried and work.
    works: Vec<String>,
    /// Features that were tried and do not work, with the reason.
    lacking: Vec<String>,
    /// Whether a process without permissions can trap its own accesses.
    user_mode: Answer,
}

/// Whether a capability is available on this host, and why.
#[derive(Clone, Serialize)]
struct Answer {
    usable: bool,
    why: String,
}

#[derive(Serialize)]
struct BackingReport {
    name: &'static str,
    unit_bytes: u64,
    /// Units that are neither in use nor reserved; absent for ordinary memory.
    free_units: Option<u64>,
    /// All units, in use or not; absent for ordinary memory.
    total_units: Option<u64>,
    /// Whether userfaultfd traps accesses to both missing and half-filled units.
    pageable: bool,
    /// For a guest_memfd: whether a VM can have one whose pages arrive on demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_memfd: Option<Answer>,
    /// The limits of the backing on every host.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    limits: &'static [&'static str],
}

/// Prints the capabilities of this host, as a table or as JSON. With `needs`, only those are
/// examined, and there is no table.
///
/// # Errors
///
/// If the host lacks one of `needs`: one line for the last of them, after a line for each other. If
/// the report cannot be printed.
pub(crate) fn probe(json: bool, needs: &[Need]) -> Result<(), Error> {
    let mut report = examine();
    report.required = needs.iter().map(|need| meet(&report, *need)).collect();
    if json {
        print(&(to_json(&report)? + "\n"))?;
    } else if needs.is_empty() {
        return print(&table(&report));
    }
    let lacking = report.required.into_iter().filter(|met| !met.answer.usable);
    let errors = lacking.map(|Met { name, answer }| CliError::Lacking { name, why: answer.why });
    let mut errors: Vec<Error> = errors.map(Error::from).collect();
    let last = errors.pop();
    errors.iter().for_each(|error| logger::say(format_args!("demand-vmm: {error}")));
    last.map_or(Ok(()), Err)
}

fn examine() -> Report {
    // A start then relies on what is found now.
    let kvm = kept_probes().map_or_else(demand_kvm::probe, |cache| cache.probe());
    examine_of(kvm, &demand_uffd::probe())
}

fn examine_of(kvm: demand_kvm::Probe, uffd: &Result<demand_uffd::Probe, OpenError>) -> Report {
    let pools = BackingKind::ALL.map(|kind| (kind, HugePagePool::of(kind)));
    let transparent = transparent_huge_pages_of_shmem();
    let (auto, auto_why) = auto(&kvm, uffd);
    let found =
        Found { kvm: &kvm, userfaultfd: uffd, pools: &pools, transparent: transparent.is_ok() };
    let linux_guests = linux_guests(kvm.virtualization);
    let traps_shmem = traps_shmem(uffd);
    let mut report = Report {
        lazy: lazy(&kvm, auto, &auto_why, &linux_guests, &traps_shmem),
        traps_shmem,
        markers: markers(demand_paging::try_markers()),
        required: Vec::new(),
        limits: limits(&kvm, auto),
        advice: advice(&found),
        linux_guests,
        backings: pools.iter().map(|(kind, pool)| backing(*kind, *pool, uffd, &kvm)).collect(),
        userfaultfd: userfaultfd(uffd),
        transparent_huge_pages: Answer {
            usable: transparent.is_ok(),
            why: match &transparent {
                Ok(()) => "shared memory gets them (thp=on)".into(),
                Err(error) => error.to_string(),
            },
        },
        kvm_as_json: Value::Null,
        kvm,
        auto: auto.map(|engine| engine.to_string()),
        auto_why,
    };
    report.kvm_as_json = kvm_as_json(&report);
    report
}

/// Returns KVM's part of the report, with the engines as the table has them.
fn kvm_as_json(report: &Report) -> Value {
    let mut engines = report.kvm.engines();
    for found in &mut engines {
        let Answer { usable, why } = meet(report, Need::Engine(found.engine)).answer;
        (found.usable, found.why) = (usable, why);
    }
    let mut kvm = json!(report.kvm);
    kvm["engines"] = json!(engines);
    kvm
}

/// Returns whether the accesses of a guest under this engine, and KVM's own, can be trapped while
/// pages are missing.
fn can_arm(kvm: &demand_kvm::Probe, engine: Engine, userfaultfd: bool) -> bool {
    userfaultfd || kvm.traps_own_accesses(engine)
}

/// Returns whether guests run before their memory has arrived: there is an engine, which has the
/// traps that it needs, and guests run at all.
fn lazy(
    kvm: &demand_kvm::Probe,
    auto: Option<Engine>,
    auto_why: &str,
    linux: &Answer,
    traps_shmem: &Result<(), String>,
) -> Answer {
    let Some(engine) = auto else { return Answer { usable: false, why: auto_why.into() } };
    match traps_shmem {
        Err(why) if !can_arm(kvm, engine, false) => {
            Answer { usable: false, why: format!("engine {engine} needs userfaultfd: {why}") }
        }
        _ if !linux.usable => linux.clone(),
        _ => Answer { usable: true, why: format!("by engine {engine}") },
    }
}

/// Returns whether userfaultfd traps accesses to both missing and unmapped pages of shared memory,
/// which was tried.
fn traps_shmem(uffd: &Result<demand_uffd::Probe, OpenError>) -> Result<(), String> {
    let probe = uffd.as_ref().map_err(ToString::to_string)?;
    for (mode, answer) in [("missing", &probe.missing_shmem), ("unmapped", &probe.minor_shmem)] {
        if let demand_uffd::Answer::No(why) = answer {
            return Err(format!("it does not trap {mode} pages of shared memory: {why}"));
        }
    }
    Ok(())
}

/// Returns whether KVM stops a vCPU at a marked page, which was tried.
fn markers(tried: Result<bool, demand_paging::Error>) -> Answer {
    let answer = |usable, why: &str| Answer { usable, why: why.into() };
    match tried {
        Ok(true) => answer(true, "KVM stops a vCPU at a marked page; only by name, see its limits"),
        Ok(false) => answer(false, "KVM does not stop a vCPU at a marked page"),
        Err(error) => answer(false, &error.to_string()),
    }
}

/// Returns the engine that `auto` chooses, and the reason.
fn auto(
    kvm: &demand_kvm::Probe,
    uffd: &Result<demand_uffd::Probe, OpenError>,
) -> (Option<Engine>, String) {
    let chosen = match (resolve(EngineChoice::Auto, kvm), uffd) {
        (Ok(engine), Err(error)) if !can_arm(kvm, engine, false) => {
            Err(format!("engine {engine} needs userfaultfd: {error}"))
        }
        (chosen, _) => chosen.map_err(|error| error.to_string()),
    };
    match chosen {
        Ok(Engine::KvmUserfault) => {
            let why = "vCPUs fault at 4K on any backing, and fetch pages on their own threads";
            (Some(Engine::KvmUserfault), why.into())
        }
        Ok(engine) => {
            let engines = kvm.engines().into_iter();
            let better = engines
                .take_while(|report| report.engine != engine)
                .map(|report| format!("{} is unavailable: {}", report.engine, report.why));
            (Some(engine), better.collect::<Vec<_>>().join("; "))
        }
        Err(why) => (None, why),
    }
}

/// Returns the limits that a user of this host must know.
fn limits(kvm: &demand_kvm::Probe, auto: Option<Engine>) -> Vec<String> {
    let Some(engine) = auto else {
        return vec![match &kvm.kvm {
            Ok(_) => "all memory of a restored guest is read before it runs (--lazy off)".into(),
            Err(_) => "no guest can run on this host".into(),
        }];
    };
    let by_unit =
        "vCPUs fault by the unit of the backing: at 4K on shmem, at 2M or 1G on huge pages";
    let of_uffd = engine.faults_by_unit().then_some(by_unit);
    kvm.limits(engine).into_iter().chain(of_uffd).map(String::from).collect()
}

fn linux_guests(virtualization: Virtualization) -> Answer {
    let answer = |usable, why: &str| Answer { usable, why: why.into() };
    match (linux::check_kvm(), virtualization) {
        (Err(error), _) => answer(false, &error.to_string()),
        (Ok(()), Virtualization::Emulated) => answer(false, linux::EMULATED),
        (Ok(()), _) => answer(true, "KVM has interrupt controllers, a timer and a processor"),
    }
}

fn userfaultfd(probe: &Result<demand_uffd::Probe, OpenError>) -> Userfaultfd {
    let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").ok();
    let mut report = Userfaultfd {
        usable: probe.is_ok(),
        error: probe.as_ref().err().map(ToString::to_string),
        access: None,
        unprivileged: unprivileged.and_then(|text| text.trim().parse().ok()),
        features: Vec::new(),
        works: Vec::new(),
        lacking: Vec::new(),
        user_mode: match demand_uffd::probe_user_mode() {
            Ok(probe) if probe.can_page(BackingKind::Shmem) => {
                let why = "without permission, for a process's own reads; not for guests";
                Answer { usable: true, why: why.into() }
            }
            Ok(probe) => Answer { usable: false, why: probe.minor_shmem.to_string() },
            Err(error) => Answer { usable: false, why: error.to_string() },
        },
    };
    if let Ok(probe) = probe {
        report.access = Some(match probe.access {
            Access::Device => "device",
            _ => "system-call",
        });
        report.features = probe.features.names().collect();
        for (feature, answer) in probe.answers() {
            match answer {
                demand_uffd::Answer::Yes => report.works.push(feature.to_string()),
                demand_uffd::Answer::No(why) => report.lacking.push(format!("{feature}: {why}")),
            }
        }
    }
    report
}

/// The device by which a process opens a userfaultfd.
const DEVICE: &str = "/dev/userfaultfd";

/// Returns whether back-ends such as vhost-device-blk can open a userfaultfd as this user, for whom
/// it works by `access`. Where the device exists, they open it, and never make the system call.
fn back_end_userfaultfd(access: Option<&str>) -> Answer {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    match (opened, access) {
        (Ok(_), _) => Answer { usable: true, why: format!("back-ends can open {DEVICE}, too") },
        (Err(error), Some("system-call")) if error.kind() == ErrorKind::NotFound => {
            let why = format!("by the system call: the kernel has no {DEVICE}");
            Answer { usable: true, why }
        }
        (Err(error), _) => {
            let why = format!(
                "vhost-device-blk must open {DEVICE}: {error}; permit it to the user that the \
                 back-ends run as"
            );
            Answer { usable: false, why }
        }
    }
}

/// Returns whether the device exists, and this user may not open it.
fn is_device_closed() -> bool {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    opened.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn backing(
    kind: BackingKind,
    pool: Option<HugePagePool>,
    uffd: &Result<demand_uffd::Probe, OpenError>,
    kvm: &demand_kvm::Probe,
) -> BackingReport {
    // A page size that this machine lacks counts as an empty pool.
    let pool = kind.is_hugetlb().then(|| pool.unwrap_or_default());
    let of_vm = kind == BackingKind::GuestMemfd;
    BackingReport {
        guest_memfd: of_vm.then(|| guest_memfd(kvm)),
        limits: if of_vm { &GUEST_MEMFD_LIMITS } else { &[] },
        name: kind.name(),
        unit_bytes: kind.unit(),
        free_units: pool.map(|pool| pool.free),
        total_units: pool.map(|pool| pool.total),
        pageable: uffd.as_ref().is_ok_and(|uffd| uffd.can_page(kind)),
    }
}

/// Returns whether a VM can have memory in a guest_memfd, and whether its pages can arrive on
/// demand.
fn guest_memfd(kvm: &demand_kvm::Probe) -> Answer {
    /// `MMAP` and `INIT_SHARED`.
    const MAPPED: u32 = 0b11;
    let answer = |usable, why: String| Answer { usable, why };
    let features = match &kvm.kvm {
        Ok(features) => features,
        Err(error) => return answer(false, error.to_string()),
    };
    if features.guest_memfd_flags & MAPPED != MAPPED {
        return answer(false, "KVM has none that can be mapped; use Linux 6.18 or newer".into());
    }
    let lazily = match features.guest_memfd_userfault {
        Trial::Works => "its pages arrive on demand, under engine kvm-userfault",
        _ => {
            "all memory is read before a guest runs: KVM does not stop vCPUs at its missing \
             pages; rust-vmm-ci/kernel has the patches"
        }
    };
    answer(true, lazily.into())
}

fn table(report: &Report) -> String {
    let mut table = String::new();
    let mut line = |name: &str, yes: bool, why: &str| {
        let mark = if yes { "yes" } else { "no" };
        writeln!(table, "  {name:<24}{mark:<5}{why}").expect("writing to a String cannot fail");
    };
    line(
        "KVM",
        report.kvm.kvm.is_ok(),
        &match &report.kvm.kvm {
            Ok(_) => report.kvm.virtualization.to_string(),
            Err(error) => error.to_string(),
        },
    );
    line("Linux guests", report.linux_guests.usable, &report.linux_guests.why);
    line("lazy restore", report.lazy.usable, &report.lazy.why);
    for engine in report.kvm.engines() {
        let Answer { usable, why } = meet(report, Need::Engine(engine.engine)).answer;
        line(&format!("engine {}", engine.engine), usable, &why);
    }
    let auto = report.auto.as_deref().unwrap_or("none works");
    line("engine auto", report.auto.is_some(), &format!("{auto}: {}", report.auto_why));
    let uffd = &report.userfaultfd;
    let why = match (&uffd.error, uffd.access, uffd.unprivileged) {
        (Some(error), ..) => error,
        (None, Some("device"), _) => "by /dev/userfaultfd; kernel faults are served as well",
        (None, _, Some(1)) => {
            "by the system call, which vm.unprivileged_userfaultfd=1 allows; kernel faults are \
             served as well"
        }
        (None, ..) => {
            "by the system call, which CAP_SYS_PTRACE allows; kernel faults are served as well"
        }
    };
    line("userfaultfd", uffd.usable, why);
    if uffd.usable {
        line("userfaultfd features", uffd.lacking.is_empty(), &uffd.works.join(" "));
        uffd.lacking.iter().for_each(|lacking| line("", false, lacking));
    }
    line("userfaultfd, user mode", uffd.user_mode.usable, &uffd.user_mode.why);
    let Answer { usable, why } = meet(report, Need::Postcopy).answer;
    line("vhost-user post-copy", usable, &why);
    for backing in &report.backings {
        let unit = size(backing.unit_bytes);
        let name = format!("backing {}", backing.name);
        if let Some(Answer { usable, why }) = &backing.guest_memfd {
            line(&name, *usable, why);
            continue;
        }
        let (free, why) = match (backing.free_units, backing.total_units) {
            (Some(free), Some(total)) => {
                (free > 0, format!("{free} of {total} pages of {unit} free"))
            }
            _ => (true, "ordinary memory".to_string()),
        };
        let untrapped = "; userfaultfd cannot trap accesses to it";
        let untrapped = if backing.pageable { "" } else { untrapped };
        line(&name, free, &format!("{why}{untrapped}"));
    }
    let transparent = &report.transparent_huge_pages;
    line("transparent huge pages", transparent.usable, &transparent.why);
    let usable = report
        .backings
        .iter()
        .filter(|backing| backing.guest_memfd.as_ref().is_none_or(|answer| answer.usable));
    let of_backings = usable.flat_map(|backing| backing.limits).copied();
    let limits = report.limits.iter().map(String::as_str).chain(of_backings);
    let notes = limits.map(|limit| format!("  note: {limit}"));
    let better = report.advice.iter().map(|Advice { aim, step }| format!("    {aim}: {step}"));
    let heading = (!report.advice.is_empty()).then(|| "  to get better:".to_string());
    for line in notes.chain(heading).chain(better) {
        writeln!(table, "{line}").expect("writing to a String cannot fail");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lazy_needs_every_trap_and_a_guest() {
        let (kvm, uffd) = (demand_kvm::probe(), demand_uffd::probe());
        let report = examine_of(kvm.clone(), &uffd);
        let lacks = |report: &Report, need| {
            let Answer { usable, why } = meet(report, need).answer;
            (!usable).then_some(why)
        };
        // The probe's own answers, on whatever host this is.
        let traps = uffd.as_ref().is_ok_and(|uffd| uffd.can_page(BackingKind::Shmem));
        let auto = resolve(EngineChoice::Auto, &kvm).ok();
        let can = auto.is_some_and(|engine| traps || kvm.traps_own_accesses(engine));
        let expected = can && report.linux_guests.usable;
        assert_eq!(lacks(&report, Need::Lazy).is_none(), expected, "{:?}", report.lazy.why);
        let (Ok(mut uffd), Some(engine)) = (uffd, auto) else { return };
        for (number, word) in ["missing", "unmapped"].into_iter().enumerate() {
            let no = demand_uffd::Answer::No(format!("reason {number}"));
            match number {
                0 => uffd.missing_shmem = no,
                _ => (uffd.missing_shmem, uffd.minor_shmem) = (demand_uffd::Answer::Yes, no),
            }
            let report = examine_of(kvm.clone(), &Ok(uffd.clone()));
            if kvm.traps_own_accesses(engine) {
                continue;
            }
            for need in [Need::Lazy, Need::Engine(Engine::Uffd), Need::Postcopy] {
                let why = lacks(&report, need).unwrap();
                let reason =
                    format!("does not trap {word} pages of shared memory: reason {number}");
                assert!(why.contains(&reason), "{need:?}: {why}");
            }
            // The report in JSON says the same of each engine.
            for found in report.kvm_as_json["engines"].as_array().unwrap() {
                let engine = serde_json::from_value(found["engine"].clone()).unwrap();
                let Answer { usable, why } = meet(&report, Need::Engine(engine)).answer;
                assert_eq!(found["usable"], usable, "{found}");
                assert_eq!(found["why"], why, "{found}");
                assert!(engine != Engine::Uffd || !usable);
            }
        }
    }
}
