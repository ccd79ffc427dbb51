// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests with a network card served by DPDK's testpmd: a foreign back-end that polls and
//! offers post-copy. They are snapshotted while echoes are in flight, and restored lazily with
//! another testpmd. `linux.rs` does so at many moments.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use demand_kvm::Engine;
use demand_tests::linux_vm::{CardOption, Kernel};
use demand_tests::snapshot_cycle::{Birth, Life, Moment, Rebirth};
use demand_vmm::report::Report;
use guest_work::Journal;

const SHMEM: &str = "backing=shmem";
const HUGETLB_2M: &str = "backing=hugetlb-2m";

/// Runs `f` in the lab, with a working guest and a folder for its snapshots.
fn test(journal: Journal, f: impl FnOnce(Life, &Path) -> Result<()>) {
    let Some(kernel) = Kernel::lab() else { return };
    let birth =
        Birth { kernel, cpus: 2, memory: "size=192M".into(), journal, net: true, reseeds: true };
    let run = || {
        let folder = tempfile::tempdir()?;
        let mut life = Life::boot(&folder.path().join("life"), &birth)?;
        life.wait_work()?;
        f(life, folder.path())
    };
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

/// Restores the guest with all its memory missing, and without background fill.
fn restore(moment: &Moment, folder: &Path, engine: Engine, memory: &'static str) -> Result<Life> {
    restore_with(CardOption::default(), moment, folder, engine, memory)
}

fn restore_with(
    card: CardOption,
    moment: &Moment,
    folder: &Path,
    engine: Engine,
    memory: &'static str,
) -> Result<Life> {
    let engine = engine.name();
    let rebirth = Rebirth { engine, memory, fill: "off", card, ..Rebirth::default() };
    let mut life = moment.restore(folder, &rebirth)?;
    life.wait_work()?;
    Ok(life)
}

fn still_lazy(report: &Report, engine: Engine) -> Result<()> {
    println!("{}", report.table());
    ensure!(report.engine == engine.name(), "{report:?}");
    ensure!(report.guest.faults + report.kvm_internal.faults > 0, "{report:?}");
    ensure!(report.back_end.faults > 0, "{report:?}");
    ensure!(report.fill.pages == 0 && report.time_to_complete_us == 0, "{report:?}");
    Ok(())
}

/// Without a disk, testpmd is the only back-end that faults. It has locked all its memory, as it
/// does by default, and so has touched the guest's memory before its accesses are trapped.
fn alone_and_locked(engine: Engine, memory: &'static str) {
    test(Journal::None, |mut life, folder| {
        let moment = life.stop_at(&folder.join("moment"))?;
        drop(life);
        let card = CardOption { locked: true, ..CardOption::default() };
        let life = restore_with(card, &moment, &folder.join("restored"), engine, memory)?;
        still_lazy(&life.finish()?, engine)
    });
}

#[test]
fn alone_and_locked_kvm_userfault_on_hugetlb_2m() {
    alone_and_locked(Engine::KvmUserfault, HUGETLB_2M);
}

#[test]
fn alone_and_locked_uffd_on_shmem() {
    alone_and_locked(Engine::Uffd, SHMEM);
}

/// The snapshotted guest continues with its testpmd, and the restored one is snapshotted while most
/// of its memory is missing.
#[test]
fn beside_a_disk_in_a_chain_of_snapshots() {
    test(Journal::Ext4, |mut life, folder| {
        let moment = life.stop_at(&folder.join("moment"))?;
        life.resume()?;
        life.wait_work()?;
        life.finish().context("the guest that was snapshotted")?;
        let engine = Engine::KvmUserfault;
        let mut life = restore(&moment, &folder.join("restored"), engine, HUGETLB_2M)?;
        let moment = life.stop_at(&folder.join("moment again"))?;
        life.resume()?;
        life.wait_work()?;
        still_lazy(&life.finish()?, engine)?;
        let engine = Engine::Uffd;
        let life = restore(&moment, &folder.join("restored again"), engine, SHMEM)?;
        still_lazy(&life.finish()?, engine)
    });
}

/// Post-copy ends while echoes are in flight. Then the guest is restored with a testpmd without
/// post-copy, which sees memory only when all of it is present.
#[test]
fn guest_restores_without_post_copy_once_complete() {
    test(Journal::Ext4, |mut life, folder| {
        let moment = life.stop_at(&folder.join("moment"))?;
        drop(life);
        let engine = Engine::KvmUserfault.name();
        let mut rebirth =
            Rebirth { engine, memory: HUGETLB_2M, fill: "rate=32M", ..Rebirth::default() };
        let mut life = moment.restore(&folder.join("restored"), &rebirth)?;
        life.wait_complete()?;
        life.wait_work()?;
        let moment = life.stop_at(&folder.join("moment again"))?;
        life.resume()?;
        life.wait_work()?;
        let report = life.finish()?;
        ensure!(report.back_end.faults > 0 && report.time_to_complete_us > 0, "{report:?}");
        rebirth.card =
            CardOption { postcopy: false, more: ",lazy=fill".into(), ..CardOption::default() };
        let mut life = moment.restore(&folder.join("restored again"), &rebirth)?;
        life.wait_work()?;
        let report = life.finish()?;
        ensure!(report.time_to_complete_us > 0, "{report:?}");
        Ok(())
    });
}
