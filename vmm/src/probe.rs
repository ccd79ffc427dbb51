// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm probe`: what this host can do, and why.

use std::fmt::Write;
use std::fs;

use demand_kvm::{Engine, EngineChoice, resolve};
use demand_memory::BackingKind;
use serde::Serialize;

use crate::error::Error;

#[derive(Serialize)]
struct Report {
    kvm: demand_kvm::Probe,
    userfaultfd: Userfaultfd,
    backings: Vec<BackingReport>,
    /// The engine that `auto` chooses; absent if there is none.
    auto: Option<String>,
    /// What is not covered here.
    limits: Vec<String>,
}

#[derive(Serialize)]
struct Userfaultfd {
    usable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct BackingReport {
    name: &'static str,
    unit_bytes: u64,
    /// Free units; absent for ordinary memory.
    free_units: Option<u64>,
    /// Whether userfaultfd can trap both what is missing and what is half there.
    pageable: bool,
}

/// What this host can do, as a table or as JSON.
///
/// # Errors
///
/// None that a host can cause; a report that cannot be written as JSON is one.
pub fn probe(json: bool) -> Result<String, Error> {
    let kvm = demand_kvm::probe();
    let uffd = demand_uffd::probe();
    let auto = resolve(EngineChoice::Auto, &kvm).ok();
    let backings = BackingKind::ALL.map(|kind| BackingReport {
        name: kind.name(),
        unit_bytes: kind.unit(),
        free_units: free_units(kind),
        pageable: uffd.as_ref().is_ok_and(|uffd| uffd.can_page(kind)),
    });
    let report = Report {
        limits: limits(&kvm, auto),
        kvm,
        userfaultfd: Userfaultfd {
            usable: uffd.is_ok(),
            error: uffd.err().map(|error| error.to_string()),
        },
        backings: backings.into(),
        auto: auto.map(|engine| engine.to_string()),
    };
    if json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| Error::failed(format!("write the report: {error}")))?;
        return Ok(json + "\n");
    }
    Ok(table(&report))
}

/// What a user of this host has to know.
fn limits(kvm: &demand_kvm::Probe, auto: Option<Engine>) -> Vec<String> {
    let Some(engine) = auto else { return vec!["no guest can run here".into()] };
    let by_unit =
        "vCPUs fault by the unit of the backing: at 4K on shmem, at 2M or 1G on huge pages";
    let of_uffd = (engine == Engine::Uffd).then_some(by_unit);
    kvm.limits(engine).into_iter().chain(of_uffd).map(String::from).collect()
}

fn free_units(kind: BackingKind) -> Option<u64> {
    if kind == BackingKind::Shmem {
        return None;
    }
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages", kind.unit() >> 10);
    Some(fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

fn table(report: &Report) -> String {
    let mut table = String::new();
    let mut line = |name: &str, yes: bool, why: &str| {
        let mark = if yes { "yes" } else { "no" };
        writeln!(table, "  {name:<24}{mark:<5}{why}").expect("a string takes everything");
    };
    line(
        "KVM",
        report.kvm.kvm.is_ok(),
        &match &report.kvm.kvm {
            Ok(_) => report.kvm.virtualization.to_string(),
            Err(error) => error.to_string(),
        },
    );
    for engine in report.kvm.engines() {
        line(&format!("engine {}", engine.engine), engine.usable, &engine.why);
    }
    let why = report.userfaultfd.error.as_deref().unwrap_or("kernel faults are served as well");
    line("userfaultfd", report.userfaultfd.usable, why);
    for backing in &report.backings {
        let (free, why) = match backing.free_units {
            None => (true, "ordinary memory".to_string()),
            Some(free) => (
                free > 0,
                format!("{free} pages of {} free", crate::report::size(backing.unit_bytes)),
            ),
        };
        line(&format!("backing {}", backing.name), backing.pageable && free, &why);
    }
    line("engine auto", report.auto.is_some(), report.auto.as_deref().unwrap_or("none works"));
    for limit in &report.limits {
        writeln!(table, "  note: {limit}").expect("a string takes everything");
    }
    table
}
