// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores of pushed snapshots through the host cache.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use demand_tests::process::{Guarded, program, succeed};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::report::{CacheReport, Report};
use test_support::wait::until;

/// Restores the snapshot `vm7` of the store beside it through the cache there, waits until all of
/// its memory has arrived, and ends it.
fn restore(snapshot: &TinySnapshot) -> CacheReport {
    let report = snapshot.at("report.json");
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["restore", "--serial", "off", "--source"]);
    command.arg(format!("file://{}", snapshot.at("store/vm7").display()));
    command.arg("--cache").arg(format!("{},size=1G", snapshot.at("cache").display()));
    command.arg("--api-socket").arg(snapshot.at("vm.sock")).arg("--report").arg(&report);
    let mut vmm = Guarded::spawn(command.stdout(Stdio::null())).unwrap();
    until("all memory has arrived", || {
        let status = snapshot.api().status();
        status.is_ok_and(|status| status.pages_present == status.pages_total)
    });
    snapshot.api().shutdown().unwrap();
    let status = vmm.wait(Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{status}");
    let report: Report = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    println!("{:?}", report.cache);
    report.cache.unwrap()
}

#[test]
fn second_restore_needs_no_chunk() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let mut push = Command::new(program("demand-vmm").unwrap());
    push.args(["image", "push"]).arg(snapshot.dir()).arg(snapshot.at("store/vm7"));
    succeed(push.stdout(Stdio::null())).unwrap();
    let first = restore(&snapshot);
    assert!(first.misses > 0 && first.written_bytes > 0, "{first:?}");
    let second = restore(&snapshot);
    assert!(second.hits > 0, "{second:?}");
    assert_eq!((second.misses, second.written_bytes), (0, 0));
}
