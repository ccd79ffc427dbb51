// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests restored lazily from servers: a snapshot's files, and a pushed snapshot, on a web
//! server, and exports of an NBD server. Each guest verifies its memory and disk; a server that is
//! stopped meanwhile is a pause, no more.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use demand_kvm::Engine;
use demand_tests::linux_vm::Kernel;
use demand_tests::page_server::PageServer;
use demand_tests::process::program;
use demand_tests::snapshot_cycle::{Birth, Life, Moment, Rebirth};
use guest_work::Journal;
use test_support::servers::Web;

/// How long a server is away.
const AWAY: Duration = Duration::from_secs(3);

/// Boots a guest with a disk, and takes a snapshot while it works.
fn moment(folder: &Path, kernel: Kernel) -> Result<Moment> {
    let birth = Birth {
        kernel,
        cpus: 2,
        memory: "size=192M".into(),
        journal: Journal::Ext4,
        net: false,
        reseeds: true,
    };
    let mut life = Life::boot(&folder.join("life"), &birth)?;
    life.wait_beats(2)?;
    life.stop_at(&folder.join("moment"))
}

fn rebirth(url: String) -> Rebirth {
    Rebirth {
        engine: Engine::KvmUserfault.name(),
        memory: "backing=hugetlb-2m",
        fill: "off",
        url: Some(url),
        ..Rebirth::default()
    }
}

/// Restores from a server without background fill, and lets the guest verify its work.
fn comes_back(moment: &Moment, folder: &Path, rebirth: &Rebirth) -> Result<()> {
    let mut life = moment.restore(folder, rebirth)?;
    life.wait_work()?;
    let report = life.finish()?;
    ensure!(report.guest.faults > 0 && report.back_end.faults > 0, "{report:?}");
    ensure!(report.source.reads > 0, "{report:?}");
    Ok(())
}

/// Restores with a slow fill, stops the server while pages are missing, starts it again, and waits
/// until the guest has all of its memory and has done more work.
fn outlasts(
    moment: &Moment,
    folder: &Path,
    rebirth: Rebirth,
    mut server: PageServer,
) -> Result<()> {
    let rebirth = Rebirth { fill: "rate=16M", ..rebirth };
    let mut life = moment.restore(folder, &rebirth)?;
    server.kill();
    thread::sleep(AWAY);
    let status = life.guest().api().status()?;
    ensure!(status.pages_present < status.pages_total, "{status:?}");
    server.restart()?;
    life.wait_complete()?;
    life.wait_work()?;
    life.expect_lines(&["attempt", "no answer for", "the server", "the connection"]);
    life.finish()?;
    Ok(())
}

fn test(f: impl FnOnce(&Path, &Moment) -> Result<()>) {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = || f(folder.path(), &moment(folder.path(), kernel)?);
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

/// Runs a command of `demand-vmm image`.
fn image(arguments: &[&str]) -> Result<()> {
    let output = Command::new(program("demand-vmm")?).arg("image").args(arguments).output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    Ok(())
}

/// The snapshot is pushed to a folder, which a web server shows.
#[test]
fn guest_returns_from_a_pushed_snapshot() {
    test(|folder, moment| {
        let store = folder.join("store");
        let (snapshot, place) = (moment.snapshot(), store.join("vm7"));
        let text = |path: &Path| path.display().to_string();
        image(&["push", &text(&snapshot), &text(&place), "--compress", "lz4"])?;
        let Some(web) = Web::start(&store, "") else { return Ok(()) };
        let url = web.url("vm7");
        image(&["verify", &url])?;
        comes_back(moment, &folder.join("restored"), &rebirth(url))
    });
}

#[test]
fn guest_outlasts_a_stopped_web_server() {
    test(|folder, moment| {
        let Some(web) = Web::start(&folder.join("moment"), "") else { return Ok(()) };
        let rebirth = rebirth(web.url("snapshot"));
        outlasts(moment, &folder.join("restored"), rebirth, PageServer::Web(web))
    });
}

#[test]
fn guest_outlasts_a_stopped_nbd_server() {
    test(|folder, moment| {
        let socket = folder.join("nbd");
        let Some(mut server) = PageServer::nbdkit(&moment.snapshot(), &socket) else {
            return Ok(());
        };
        server.restart()?;
        let url = format!("nbd+unix:///?socket={}", socket.display());
        outlasts(moment, &folder.join("restored"), rebirth(url), server)
    });
}
