// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm probe`: the capabilities of this host, the reasons, and steps to improve them.

use std::fmt::Write;
use std::fs;

use demand_kvm::{Engine, EngineChoice, Virtualization, resolve};
use demand_memory::{BackingKind, HugePagePool, transparent_huge_pages_of_shmem};
use demand_uffd::{Access, OpenError};
use serde::Serialize;

use crate::cli::advice::{Advice, Found, advice};
use crate::error::Error;
use crate::report::size;
use crate::vm::linux;

#[derive(Serialize)]
struct Report {
    kvm: demand_kvm::Probe,
    userfaultfd: Userfaultfd,
    backings: Vec<BackingReport>,
    transparent_huge_pages: Answer,
    linux_guests: Answer,
    /// The engine that `auto` chooses; absent if no engine works.
    auto: Option<String>,
    /// The reason for that choice.
    auto_why: String,
    /// The limits of this host.
    limits: Vec<String>,
    /// The recommended changes.
    advice: Vec<Advice>,
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
}

/// Whether a capability is available on this host, and why.
#[derive(Serialize)]
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
}

/// Reports the capabilities of this host, as a table or as JSON.
///
/// # Errors
///
/// If the report cannot be written as JSON. No host causes an error.
pub fn probe(json: bool) -> Result<String, Error> {
    let kvm = demand_kvm::probe();
    let uffd = demand_uffd::probe();
    let pools = BackingKind::ALL.map(|kind| (kind, HugePagePool::of(kind)));
    let transparent = transparent_huge_pages_of_shmem();
    let (auto, auto_why) = auto(&kvm, &uffd);
    let found =
        Found { kvm: &kvm, userfaultfd: &uffd, pools: &pools, transparent: transparent.is_ok() };
    let report = Report {
        limits: limits(&kvm, auto),
        advice: advice(&found),
        linux_guests: linux_guests(kvm.virtualization),
        backings: pools.iter().map(|(kind, pool)| backing(*kind, *pool, &uffd)).collect(),
        userfaultfd: userfaultfd(&uffd),
        transparent_huge_pages: Answer {
            usable: transparent.is_ok(),
            why: transparent.err().unwrap_or_else(|| "shared memory gets them (thp=on)".into()),
        },
        kvm,
        auto: auto.map(|engine| engine.to_string()),
        auto_why,
    };
    if json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| Error::failed(format!("cannot write the report: {error}")))?;
        return Ok(json + "\n");
    }
    Ok(table(&report))
}

/// Returns the engine that `auto` chooses, and the reason.
fn auto(
    kvm: &demand_kvm::Probe,
    uffd: &Result<demand_uffd::Probe, OpenError>,
) -> (Option<Engine>, String) {
    // Under every engine, some of the readers are trapped only by a userfaultfd.
    let chosen = match uffd {
        Ok(_) => resolve(EngineChoice::Auto, kvm).map_err(|error| error.to_string()),
        Err(error) => Err(format!("every engine needs userfaultfd: {error}")),
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
    let Some(engine) = auto else { return vec!["no guest can run on this host".into()] };
    let by_unit =
        "vCPUs fault by the unit of the backing: at 4K on shmem, at 2M or 1G on huge pages";
    let of_uffd = (engine == Engine::Uffd).then_some(by_unit);
    kvm.limits(engine).into_iter().chain(of_uffd).map(String::from).collect()
}

fn linux_guests(virtualization: Virtualization) -> Answer {
    let answer = |usable, why: &str| Answer { usable, why: why.into() };
    match (linux::check_kvm(), virtualization) {
        (Err(error), _) => answer(false, &error.to_string()),
        (Ok(()), Virtualization::Emulated) => {
            answer(false, "an emulating KVM cannot boot an unmodified Linux")
        }
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

fn backing(
    kind: BackingKind,
    pool: Option<HugePagePool>,
    uffd: &Result<demand_uffd::Probe, OpenError>,
) -> BackingReport {
    // A page size that this machine lacks counts as an empty pool.
    let pool = (kind != BackingKind::Shmem).then(|| pool.unwrap_or_default());
    BackingReport {
        name: kind.name(),
        unit_bytes: kind.unit(),
        free_units: pool.map(|pool| pool.free),
        total_units: pool.map(|pool| pool.total),
        pageable: uffd.as_ref().is_ok_and(|uffd| uffd.can_page(kind)),
    }
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
    for engine in report.kvm.engines() {
        line(&format!("engine {}", engine.engine), engine.usable, &engine.why);
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
    for backing in &report.backings {
        let unit = size(backing.unit_bytes);
        let (free, why) = match (backing.free_units, backing.total_units) {
            (Some(free), Some(total)) => {
                (free > 0, format!("{free} of {total} pages of {unit} free"))
            }
            _ => (true, "ordinary memory".to_string()),
        };
        line(&format!("backing {}", backing.name), backing.pageable && free, &why);
    }
    let transparent = &report.transparent_huge_pages;
    line("transparent huge pages", transparent.usable, &transparent.why);
    let notes = report.limits.iter().map(|limit| format!("  note: {limit}"));
    let better = report.advice.iter().map(|Advice { aim, step }| format!("    {aim}: {step}"));
    let heading = (!report.advice.is_empty()).then(|| "  to get better:".to_string());
    for line in notes.chain(heading).chain(better) {
        writeln!(table, "{line}").expect("writing to a String cannot fail");
    }
    table
}
