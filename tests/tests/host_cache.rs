// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores of pushed snapshots through the host cache. `CACHE_VMS` gives the number of VMs that
//! share it (`rust-vmm-ci/soak --sources`).

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::process::{Guarded, program};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::client::Client;
use demand_vmm::report::{CacheReport, Report};
use test_support::servers::Web;

/// Number of VMs that share a cache, unless the environment says otherwise.
const VMS: usize = 6;
/// Bytes of a chunk before compression.
const CHUNK: u64 = 64 << 10;

/// Waits while many VMs share the processors.
fn patiently(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(240), "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// A VM restored through the cache beside its snapshot.
struct Restored {
    vmm: Guarded,
    api: Client,
    report: PathBuf,
}

impl Restored {
    fn start(snapshot: &TinySnapshot, source: &str, number: usize) -> Restored {
        let (report, socket) = (format!("report{number}.json"), format!("vm{number}.sock"));
        let (report, socket) = (snapshot.at(&report), snapshot.at(&socket));
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(["restore", "--serial", "off", "--source", source, "--cache"]);
        command.arg(format!("{},size=1G", snapshot.at("cache").display()));
        command.arg("--api-socket").arg(&socket).arg("--report").arg(&report);
        let vmm = Guarded::spawn(command.stdout(Stdio::null())).unwrap();
        Restored { vmm, api: Client::new(socket), report }
    }

    /// Waits until all of its memory has arrived, and ends it.
    fn finish(mut self) -> CacheReport {
        let api = &self.api;
        patiently("all memory has arrived", || {
            api.status().is_ok_and(|status| status.pages_present == status.pages_total)
        });
        self.api.shutdown().unwrap();
        let status = self.vmm.wait(Duration::from_secs(60)).unwrap();
        assert!(status.success(), "{status}");
        let report: Report = serde_json::from_slice(&fs::read(&self.report).unwrap()).unwrap();
        println!("{:?}", report.cache);
        report.cache.unwrap()
    }
}

#[test]
fn second_restore_needs_no_chunk() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let url = snapshot.push().unwrap();
    let first = Restored::start(&snapshot, &url, 0).finish();
    assert!(first.misses > 0 && first.written_bytes > 0, "{first:?}");
    let second = Restored::start(&snapshot, &url, 0).finish();
    assert!(second.hits > 0, "{second:?}");
    assert_eq!((second.misses, second.written_bytes), (0, 0));
}

/// Returns how many bytes of packs a web server has sent.
fn sent(web: &Web) -> u64 {
    let packs = web.requests().into_iter().filter(|line| line.contains("GET /packs/"));
    // See the combined format of nginx: request, status, bytes of the body.
    packs
        .map(|line| line.rsplit("HTTP/1.1\" 206 ").next().unwrap().to_owned())
        .map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

#[test]
fn many_vms_fetch_each_chunk_once() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    snapshot.enlarge(&TinySnapshot::content(24 << 20)).unwrap();
    snapshot.push().unwrap();
    let Some(web) = Web::start(&snapshot.at("store"), "") else { return };
    let url = web.url("vm7");
    let alone = Restored::start(&snapshot, &url, 0).finish();
    let bytes = sent(&web);
    assert!(alone.misses >= (24 << 20) / CHUNK && bytes > 0, "{alone:?}, {bytes} bytes");

    fs::remove_dir_all(snapshot.at("cache")).unwrap();
    let vms = std::env::var("CACHE_VMS").ok().map_or(VMS, |vms| vms.parse().unwrap());
    let start = |number| Restored::start(&snapshot, &url, number);
    let mut first = start(0);
    let others: Vec<_> = (1..vms).map(start).collect();
    // One of them is killed while it fetches.
    patiently("the first VM fetches", || sent(&web) > bytes + bytes / 8);
    first.vmm.child().kill().unwrap();
    let reports: Vec<_> = others.into_iter().map(Restored::finish).collect();
    let sum = |f: fn(&CacheReport) -> u64| reports.iter().map(f).sum::<u64>();
    let (misses, overdue) = (sum(|it| it.misses), sum(|it| it.overdue));
    let again = sent(&web) - bytes;
    println!("{vms} VMs: {misses} chunks, {overdue} of them late; {again} bytes, alone {bytes}");
    assert!(misses - overdue <= alone.misses, "{misses} chunks, alone {}", alone.misses);
    // The chunks of the killed one's open requests come again.
    assert!(again <= bytes + overdue * CHUNK + (4 << 20), "{again} bytes, alone {bytes}");
}
