// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores that record and replay the working set of a pushed snapshot.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use demand_tests::process::{Guarded, program, succeed};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::report::{Report, WorkingSetReport};
use test_support::wait::until;

/// Restores the snapshot `vm7` of the store beside it, waits until all of its memory is present,
/// and ends it.
fn restore(snapshot: &TinySnapshot, working_set: &str) -> WorkingSetReport {
    let report = snapshot.at("report.json");
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["restore", "--serial", "off", "--working-set", working_set, "--source"]);
    command.arg(format!("file://{}", snapshot.at("store/vm7").display()));
    command.arg("--api-socket").arg(snapshot.at("vm.sock")).arg("--report").arg(&report);
    let mut vmm = Guarded::spawn(command.stdout(Stdio::null())).unwrap();
    until("all memory is present", || {
        let status = snapshot.api().status();
        status.is_ok_and(|status| status.pages_present == status.pages_total)
    });
    snapshot.api().shutdown().unwrap();
    let status = vmm.wait(Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{status}");
    let report: Report = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    println!("{:?}", report.working_set);
    report.working_set.unwrap()
}

#[test]
fn second_restore_replays_the_first() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let mut push = Command::new(program("demand-vmm").unwrap());
    push.args(["image", "push"]).arg(snapshot.dir()).arg(snapshot.at("store/vm7"));
    succeed(push.stdout(Stdio::null())).unwrap();
    let first = restore(&snapshot, "auto,seconds=1");
    assert!(first.recorded_pages > 0 && first.misses > 0, "{first:?}");
    assert_eq!((first.replayed_pages, first.error.as_deref()), (0, None));
    assert_eq!(fs::read_dir(snapshot.at("store/ws")).unwrap().count(), 1);
    let second = restore(&snapshot, "replay,seconds=1");
    assert_eq!(second.replayed_pages, first.recorded_pages);
    assert_eq!((second.recorded_pages, second.failed_frames), (0, 0));
    assert!(second.hits + second.late > 0, "{second:?}");
}
