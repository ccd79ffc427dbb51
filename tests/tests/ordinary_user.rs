// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores by an ordinary user who may use `/dev/kvm` and nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use demand_kvm::Virtualization;
use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{Guarded, program};
use demand_tests::refusal::{HOST, Refusals};
use demand_tests::sandbox::{Device, for_everybody, is_root, with_devices};
use demand_tests::tiny_kernel::{LOOP, pvh_kernel};
use demand_vmm::api::client::Client;
use demand_vmm::api::{Go, SnapshotRequest, State};
use serde_json::Value;
use test_support::wait::until;

/// Time limit for an end on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A user without other processes, and without groups.
const USER: u32 = 54_322;

/// A snapshot that the user may read, and a program that every user may run.
struct Setting {
    folder: tempfile::TempDir,
    program: PathBuf,
    devices: Vec<Device>,
}

/// A guest that runs, and the way to its API.
struct Running {
    vmm: Guarded,
    client: Client,
}

impl Running {
    fn start(command: &mut Command, socket: &Path) -> Self {
        command.arg("--api-socket").arg(socket).stdin(Stdio::null()).stdout(Stdio::null());
        let (vmm, client) = (Guarded::spawn(command).unwrap(), Client::new(socket));
        until("the guest runs", || {
            client.status().is_ok_and(|status| status.state == State::Running)
        });
        Running { vmm, client }
    }

    /// Returns whether the process has a userfaultfd.
    fn has_userfaultfd(&self) -> bool {
        fs::read_dir(format!("/proc/{}/fd", self.vmm.id())).unwrap().flatten().any(|entry| {
            fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("userfaultfd"))
        })
    }

    fn end(mut self) {
        self.client.shutdown().unwrap();
        assert!(self.vmm.wait(SOON).unwrap().success());
    }
}

impl Setting {
    fn new() -> Option<Self> {
        let kvm = Device::of_machine(c"/dev/kvm", 0o666);
        let uffd = Device::of_machine(c"/dev/userfaultfd", 0o600);
        let (true, true, Some(kvm)) = (is_root(), has_kvm(), kvm) else {
            skip("it takes root and a usable /dev/kvm");
            return None;
        };
        if demand_kvm::probe().virtualization == Virtualization::Emulated {
            skip("an emulating KVM restores no processor");
            return None;
        }
        let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
        if unprivileged.is_ok_and(|text| text.trim() == "1") {
            skip("vm.unprivileged_userfaultfd lets every user trap the kernel's faults");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let program = for_everybody("demand-vmm", folder.path()).unwrap();
        let devices = [Some(kvm), uffd].into_iter().flatten().collect();
        let setting = Setting { folder, program, devices };
        setting.snapshot();
        Some(setting)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn snapshot(&self) {
        fs::write(self.at("kernel"), pvh_kernel(LOOP)).unwrap();
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(["run", "--memory", "64M", "--serial", "off", "--kernel"]);
        let running = Running::start(command.arg(self.at("kernel")), &self.at("run.sock"));
        let request = SnapshotRequest { destination: self.at("snapshot"), then: Some(Go::Resume) };
        running.client.snapshot(&request, |_| {}).unwrap();
        running.end();
        let mut owner = Command::new("chown");
        owner.arg("-R").arg(USER.to_string()).arg(self.at("snapshot"));
        assert!(owner.status().unwrap().success());
        fs::create_dir(self.at("out")).unwrap();
        fs::set_permissions(self.at("out"), fs::Permissions::from_mode(0o777)).unwrap();
    }

    /// Returns a restore by the user.
    fn restore(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("restore").arg("--source").arg(self.at("snapshot"));
        command.args(["--serial", "off"]).args(arguments);
        with_devices(&mut command, self.devices.clone(), Some(USER));
        command
    }

    /// Returns the report of a restore that works, what it said, and whether it had a userfaultfd.
    fn restored(&self, arguments: &[&str]) -> (Value, String, bool) {
        let (report, log) = (self.at("out/report"), self.at("out/log"));
        let mut command = self.restore(arguments);
        command.arg("--report").arg(&report).stderr(fs::File::create(&log).unwrap());
        let running = Running::start(&mut command, &self.at("out/vm.sock"));
        let has_userfaultfd = running.has_userfaultfd();
        let client = running.client.clone();
        until("all pages are present", || {
            let status = client.status().unwrap();
            status.pages_present == status.pages_total
        });
        running.end();
        let report = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        (report, fs::read_to_string(log).unwrap(), has_userfaultfd)
    }
}

#[test]
fn user_of_kvm_restores_without_userfaultfd() {
    let Some(setting) = Setting::new() else { return };
    // The kernel may guard KVM's own accesses; then no userfaultfd is needed.
    let probe = demand_kvm::probe();
    let auto = demand_kvm::resolve(demand_kvm::EngineChoice::Auto, &probe).unwrap();
    let needs_none = probe.traps_own_accesses(auto);

    let (report, said, userfaultfd) = setting.restored(&["--lazy", "off"]);
    assert_eq!((&report["engine"], userfaultfd, &*said), (&"none".into(), false, ""));
    assert_eq!(report["fill"]["pages"], 64 << 20 >> 12, "{report:#}");

    let (report, said, userfaultfd) = setting.restored(&["--lazy", "auto"]);
    if needs_none {
        assert_eq!((&report["engine"], &*said), (&auto.name().into(), ""));
    } else {
        assert_eq!((&report["engine"], said.lines().count()), (&"none".into(), 1), "{said}");
        assert!(said.contains("all guest memory is read before the guest runs"), "{said}");
    }
    assert!(!userfaultfd);
    assert_eq!(setting.restored(&[]).0["engine"], report["engine"]);

    let mut refusals = Refusals::new();
    let words = ["/dev/userfaultfd"];
    if needs_none {
        let (report, ..) = setting.restored(&["--lazy", "require"]);
        assert_eq!(report["engine"], auto.name());
    } else {
        let mut command = setting.restore(&["--lazy", "require"]);
        refusals.check("no userfaultfd", &mut command, HOST, &words);
    }
    // An engine that was named is not replaced.
    for lazy in ["auto", "require"] {
        let mut command = setting.restore(&["--lazy", lazy, "--engine", "uffd"]);
        refusals.check(&format!("uffd, {lazy}"), &mut command, HOST, &words);
    }
    let (report, ..) = setting.restored(&["--lazy", "off", "--engine", "uffd"]);
    assert_eq!(report["engine"], "none");
    refusals.end();
}
