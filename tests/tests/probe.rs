// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm probe` reports what this host supports, and what to change.

use std::fs;
use std::process::Command;
use std::time::Duration;

use demand_kvm::{Engine, EngineChoice, Virtualization};
use demand_memory::BackingKind;
use demand_tests::cannot_run;
use demand_tests::host::{free_units, has_kvm, is_lab, skip};
use demand_tests::process::{program, run};
use demand_tests::refusal::{HOST, USAGE};
use demand_tests::sandbox::{Device, for_everybody, is_root, with_devices};
use serde_json::Value;

/// Returns the program's output; it succeeds whatever it finds.
fn printed(command: &mut Command) -> String {
    let output = run(command, Duration::from_secs(60)).unwrap();
    assert!(output.status.success(), "{}", output.stderr);
    output.stdout
}

fn probe() -> Command {
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.arg("probe");
    command
}

fn as_json(command: &mut Command) -> Value {
    serde_json::from_str(&printed(command.arg("--json"))).unwrap()
}

/// Returns a line of the table: whether the host has it, and the reason.
fn row<'a>(table: &'a str, name: &str) -> (&'a str, &'a str) {
    let rest = table.lines().find_map(|line| line.trim_start().strip_prefix(name));
    rest.unwrap_or_default().trim_start().split_once(' ').unwrap_or_default()
}

/// Returns the advised steps.
fn steps(report: &Value) -> Vec<&str> {
    let advice = report["advice"].as_array().unwrap();
    advice.iter().map(|advice| advice["step"].as_str().unwrap()).collect()
}

#[test]
fn report_agrees_with_the_crates() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let (kvm, uffd) = (demand_kvm::probe(), demand_uffd::probe().unwrap());
    let report = as_json(&mut probe());
    let auto = demand_kvm::resolve(EngineChoice::Auto, &kvm).unwrap();
    assert_eq!(report["auto"], auto.to_string());
    let names: Vec<_> = uffd.features.names().collect();
    assert_eq!(report["userfaultfd"]["features"], serde_json::to_value(names).unwrap());
    for (backing, kind) in report["backings"].as_array().unwrap().iter().zip(BackingKind::ALL) {
        assert_eq!(backing["pageable"], uffd.can_page(kind), "{backing}");
        // Tests of other programs may take some meanwhile, but no more than exist.
        let (free, total) = (backing["free_units"].as_u64(), backing["total_units"].as_u64());
        assert_eq!((free.is_some(), free <= total), (kind.is_hugetlb(), true));
    }
    let emulated = !runs_linux();
    assert_eq!(report["linux_guests"]["usable"], !emulated, "{report:#}");
    let why = report["auto_why"].as_str().unwrap();
    assert_eq!(auto == Engine::Uffd, why.contains("kvm-userfault is unavailable: "), "{why}");
    let advised = |word: &str| steps(&report).iter().any(|step| step.contains(word));
    assert_eq!(advised("KVM Userfault"), auto == Engine::Uffd);
    assert_eq!(advised("VMX or AMD SVM"), emulated);
    if is_lab() {
        let works = report["userfaultfd"]["works"].as_array().unwrap().len();
        assert_eq!((auto, works), (Engine::KvmUserfault, 5), "{report:#}");
        assert_eq!(report["markers"]["usable"], true, "{report:#}");
        assert!(free_units(BackingKind::Hugetlb2M) == 0 || !advised("vm.nr_hugepages="));
    }
}

#[test]
fn the_table_has_a_line_for_each_thing() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let (table, report) = (printed(&mut probe()), as_json(&mut probe()));
    for name in [
        "KVM",
        "Linux guests",
        "lazy restore",
        "engine kvm-userfault",
        "engine uffd",
        "engine kvm-attributes",
        "engine auto",
        "userfaultfd",
        "userfaultfd features",
        "userfaultfd, user mode",
        "vhost-user post-copy",
        "backing shmem",
        "backing hugetlb-2m",
        "backing hugetlb-1g",
        "backing guest-memfd",
        "transparent huge pages",
    ] {
        let lines = table.lines().filter(|line| {
            let rest = line.trim_start().strip_prefix(name).unwrap_or("").trim_start();
            rest.starts_with("yes ") || rest.starts_with("no ")
        });
        assert_eq!(lines.count(), 1, "{name} in:\n{table}");
    }
    for step in steps(&report) {
        assert!(table.contains(&format!(": {step}\n")), "{step} is not in:\n{table}");
    }
    assert_eq!(table.contains("to get better:"), !steps(&report).is_empty(), "{table}");
}

/// Whether this host's KVM runs Linux, which one that emulates the processor does not.
fn runs_linux() -> bool {
    demand_kvm::probe().virtualization != Virtualization::Emulated
}

/// Returns the lines of a probe that must end with this status.
fn lines(command: &mut Command, status: i32) -> (String, Vec<String>) {
    let output = run(command, Duration::from_secs(60)).unwrap();
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    (output.stdout, output.stderr.lines().map(Into::into).collect())
}

#[test]
fn each_lacking_requirement_has_a_line() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    // As root, this host has what the tests need.
    let has = ["--require", "kvm,userfaultfd,uffd", "--require", "postcopy,shmem"];
    assert_eq!(lines(probe().args(has), 0), (String::new(), Vec::new()));
    // No guest runs lazily where none runs.
    let (status, count) = if runs_linux() { (0, 0) } else { (HOST, 2) };
    let (_, said) = lines(probe().args(["--require", "lazy,linux"]), status);
    assert_eq!(said.len(), count, "{said:?}");
    if !is_root() {
        return skip("only root can hide a device");
    }
    let hidden = |arguments: &[&str]| {
        let mut command = probe();
        command.args(arguments);
        with_devices(&mut command, Vec::new(), None);
        command
    };
    let lacks = ["kvm", "lazy", "kvm-userfault", "linux"];
    let required = format!("shmem,{}", lacks.join(","));
    let (table, said) = lines(&mut hidden(&["--require", &required]), HOST);
    assert_eq!((table.as_str(), said.len()), ("", lacks.len()), "{said:?}");
    for (name, line) in lacks.iter().zip(&said) {
        let begin = format!("demand-vmm: this host lacks {name}: ");
        assert!(line.starts_with(&begin) && line.contains("/dev/kvm"), "{line}");
    }
    let (json, said) = lines(&mut hidden(&["--json", "--require", "kvm,userfaultfd"]), HOST);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(said.len(), 1);
    assert_eq!(report["required"][0]["name"], "kvm");
    let met = [0, 1].map(|index| report["required"][index]["usable"].as_bool().unwrap());
    assert_eq!(met, [false, true]);
    let (_, said) = lines(probe().args(["--require", "magic"]), USAGE);
    assert!(said[0].contains("unknown capability 'magic'; choose among kvm, "), "{said:?}");
}

#[test]
fn host_without_kvm_is_unusable_and_advised() {
    if !is_root() {
        return skip("only root can hide a device");
    }
    let hidden = || {
        let mut command = probe();
        with_devices(&mut command, Vec::new(), None);
        command
    };
    let report = as_json(&mut hidden());
    assert_eq!(report["kvm"]["usable"], false);
    assert_eq!(report["linux_guests"]["usable"], false);
    assert_eq!(report["auto"], Value::Null);
    assert!(report["auto_why"].as_str().unwrap().contains("/dev/kvm"), "{report:#}");
    assert!(steps(&report)[0].contains("modprobe"), "{report:#}");
    // Root has a userfaultfd without the device.
    assert_eq!(report["userfaultfd"]["access"], "system-call");
    let table = printed(&mut hidden());
    assert!(table.contains("by the system call, which "), "{table}");
}

#[test]
fn user_without_userfaultfd_gets_advice() {
    let kvm = Device::of_machine(c"/dev/kvm", 0o666);
    let uffd = Device::of_machine(c"/dev/userfaultfd", 0o600);
    let (true, true, Some(kvm), Some(uffd)) = (is_root(), has_kvm(), kvm, uffd) else {
        return skip("needs root, KVM and /dev/userfaultfd");
    };
    let folder = tempfile::tempdir().unwrap();
    let vmm = for_everybody("demand-vmm", folder.path()).unwrap();
    let probe = || {
        let mut command = Command::new(&vmm);
        with_devices(command.arg("probe"), vec![kvm, uffd], Some(65534));
        command
    };
    let report = as_json(&mut probe());
    assert_eq!(report["userfaultfd"]["user_mode"]["usable"], true, "{report:#}");
    if report["userfaultfd"]["unprivileged"] == 1 {
        assert_eq!(report["userfaultfd"]["access"], "system-call", "{report:#}");
        return;
    }
    assert_eq!(report["userfaultfd"]["usable"], false);
    let table = printed(&mut probe());
    let (mark, why) = row(&table, "engine uffd");
    assert!(mark == "no" && why.contains("userfaultfd"), "{table}");
    assert_eq!(row(&table, "vhost-user post-copy").0, "no", "{table}");
    let (mark, why) = row(&table, "backing shmem");
    assert!(mark == "yes" && why.contains("userfaultfd cannot trap"), "{table}");
    let kvm = demand_kvm::probe();
    let auto = demand_kvm::resolve(EngineChoice::Auto, &kvm).unwrap();
    if kvm.traps_own_accesses(auto) {
        assert_eq!(report["auto"], auto.name());
    } else {
        assert_eq!(report["auto"], Value::Null);
        assert!(report["auto_why"].as_str().unwrap().contains("userfaultfd"), "{report:#}");
    }
    assert!(steps(&report).iter().any(|step| step.contains("chmod g+rw /dev/userfaultfd")));
    // The setting belongs to the whole machine.
    if is_lab() {
        const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
        fs::write(SYSCTL, "1").unwrap();
        let outcome = std::panic::catch_unwind(|| (as_json(&mut probe()), printed(&mut probe())));
        fs::write(SYSCTL, "0").unwrap();
        let (report, table) = outcome.unwrap();
        assert_eq!(report["userfaultfd"]["access"], "system-call", "{report:#}");
        assert_eq!(report["userfaultfd"]["unprivileged"], 1);
        assert!(table.contains("which vm.unprivileged_userfaultfd=1 allows"), "{table}");
        // vhost-device-blk opens the device where it exists.
        let (mark, why) = row(&table, "vhost-user post-copy");
        assert!(mark == "no" && why.contains("vhost-device-blk must open /dev/"), "{table}");
        assert_eq!(row(&table, "engine uffd").0, "yes", "{table}");
    }
}
