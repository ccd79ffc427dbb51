// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests, snapshotted at random moments under load and restored lazily: they verify by
//! themselves that no byte is wrong, no request is lost or repeated, no clock is off, and that
//! their kernels report no problem.
//!
//! `rust-vmm-ci/soak --snapshots` repeats these tests many times: `LINUX_MOMENTS` is the number of
//! moments for each engine and backing, `LINUX_SEED` the seed of all choices.

use std::fs::File;
use std::hash::Hasher;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use demand_kvm::Engine;
use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::host::{skip_without_patch, transparent_huge_pages};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::program;
use demand_tests::refusal::{FAILED, HOST, Refusals};
use demand_tests::snapshot_cycle::{Birth, Life, Moment, Rebirth};
use demand_vmm::api::Status;
use guest_work::Journal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Maximum number of moments in one life, limited by the machine's space: each is a snapshot and a
/// disk.
const IN_A_LIFE: u64 = 5;
/// Latest time of the first moment, which is usually during the boot, in milliseconds.
const BOOT_MS: u64 = 3000;
/// Longest time to the next moment, in milliseconds.
const NEXT_MS: u64 = 2500;

const SHMEM: &str = "backing=shmem";
const SHMEM_THP: &str = "backing=shmem,thp=on";
const HUGETLB_2M: &str = "backing=hugetlb-2m";
const HUGETLB_1G: &str = "backing=hugetlb-1g";
const GUEST_MEMFD: &str = "backing=guest-memfd";

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Runs `f` with the kernel, if the lab provides it.
fn test(kernel: Option<Kernel>, f: impl FnOnce(Kernel) -> Result<()>) {
    if let Some(kernel) = kernel {
        f(kernel).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

/// Moments of one life, all chosen by a seed.
struct Plan {
    birth: Birth,
    engine: Engine,
    restored: &'static str,
    moments: u64,
    seed: u64,
}

impl Plan {
    /// Boots a guest, snapshots it at each moment, checks that it continues unaffected, and then
    /// that each restored one does.
    fn run(&self) -> Result<()> {
        let temporary = tempfile::tempdir()?;
        let at = |name: String| temporary.path().join(name);
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut life = Life::boot(&at("life".into()), &self.birth)?;
        let mut moments = Vec::new();
        for number in 0..self.moments {
            if number == 1 {
                life.wait_beats(1)?;
            }
            let most_ms = if number == 0 { BOOT_MS } else { NEXT_MS };
            let pause = Duration::from_millis(random.random_range(0..most_ms));
            std::thread::sleep(pause);
            let what = format!("moment {number}, {pause:?} later");
            let moment = life.stop_at(&at(format!("moment{number}")));
            let moment = moment.with_context(|| what.clone())?;
            life.resume()?;
            moments.push((moment, what));
        }
        // Before that its console may lose what it is sent.
        life.wait_beats(1)?;
        life.finish().context("the guest that was snapshotted")?;
        for (number, (moment, what)) in moments.into_iter().enumerate() {
            let fill = ["off", "on", "rate=16M"][random.random_range(0..3)];
            let rebirth = Rebirth {
                engine: self.engine.name(),
                memory: self.restored,
                fill,
                ..Rebirth::default()
            };
            let folder = at(format!("restored{number}"));
            let begun = Instant::now();
            comes_back(&moment, &folder, &rebirth)
                .with_context(|| format!("{what}, restored with --fill {fill}"))?;
            std::fs::remove_dir_all(folder)?;
            let (cpus, took) = (self.birth.cpus, begun.elapsed());
            println!("came back: {cpus} vCPUs, {what}, --fill {fill}, in {took:.1?}");
        }
        Ok(())
    }
}

fn comes_back(moment: &Moment, folder: &Path, rebirth: &Rebirth) -> Result<()> {
    let mut life = moment.restore(folder, rebirth)?;
    life.wait_work()?;
    let status = life.guest().api().status()?;
    ensure!(status.engine == rebirth.engine, "{status:?}");
    let report = life.finish()?;
    ensure!(report.guest.faults + report.kvm_internal.faults > 0, "{report:?}");
    // With a page of 1 GiB, the back-end's first access fetches all of it.
    if rebirth.fill == "off" && rebirth.memory != HUGETLB_1G {
        ensure!(report.fill.pages == 0 && report.time_to_complete_us == 0, "{report:?}");
    }
    Ok(())
}

/// Tests an engine and a backing with guests of all kinds in turn, beginning with `first`.
fn moments(engine: Engine, restored: &'static str, first: u64) {
    let (Some(image), Some(elf)) = (Kernel::lab(), Kernel::lab_elf()) else { return };
    if restored == SHMEM_THP && !transparent_huge_pages() {
        return;
    }
    // A life with two snapshots suffices once for each unit.
    let usual = if restored != SHMEM_THP && engine == Engine::KvmUserfault { 2 } else { 1 };
    let mut left = number("LINUX_MOMENTS").unwrap_or(usual);
    let seed = number("LINUX_SEED").unwrap_or(1);
    for life in first.. {
        if left == 0 {
            return;
        }
        let (kernel, journal) = [
            (&image, Journal::Raw),
            (&elf, Journal::Ext4),
            (&image, Journal::Ext4),
            (&elf, Journal::Raw),
        ][(life % 4) as usize];
        // No back-end can wait for the pages of a guest_memfd.
        let journal = if restored == GUEST_MEMFD { Journal::None } else { journal };
        let booted = if life % 2 == 0 { restored } else { SHMEM };
        let plan = Plan {
            birth: Birth {
                kernel: kernel.clone(),
                cpus: [1, 2, 4][(life % 3) as usize],
                memory: format!("size=192M,{booted}"),
                journal,
                net: life / 2 % 2 == 1 && restored != GUEST_MEMFD,
                reseeds: true,
            },
            engine,
            restored,
            moments: left.min(IN_A_LIFE),
            seed: seed + life,
        };
        left -= plan.moments;
        plan.run().unwrap_or_else(|error| {
            panic!("life {life} with LINUX_SEED={seed}, {:?}: {error:#}", plan.birth)
        });
    }
}

#[test]
fn kvm_userfault_on_shmem() {
    moments(Engine::KvmUserfault, SHMEM, 0);
}

#[test]
fn kvm_userfault_on_shmem_thp() {
    moments(Engine::KvmUserfault, SHMEM_THP, 1);
}

#[test]
fn kvm_userfault_on_hugetlb_2m() {
    moments(Engine::KvmUserfault, HUGETLB_2M, 2);
}

#[test]
fn uffd_on_shmem() {
    moments(Engine::Uffd, SHMEM, 3);
}

#[test]
fn uffd_on_shmem_thp() {
    moments(Engine::Uffd, SHMEM_THP, 4);
}

#[test]
fn uffd_on_hugetlb_2m() {
    moments(Engine::Uffd, HUGETLB_2M, 5);
}

#[test]
fn uffd_poison_on_shmem() {
    moments(Engine::UffdPoison, SHMEM, 6);
}

#[test]
fn uffd_poison_on_shmem_thp() {
    moments(Engine::UffdPoison, SHMEM_THP, 7);
}

#[test]
fn uffd_poison_on_hugetlb_2m() {
    moments(Engine::UffdPoison, HUGETLB_2M, 8);
}

/// Only newer kernels have such memory: on others, its refusal is tested.
#[test]
fn kvm_userfault_on_guest_memfd() {
    let Some(kernel) = Kernel::lab() else { return };
    let features = demand_kvm::probe().kvm.unwrap();
    if features.guest_memfd_userfault.works() {
        return moments(Engine::KvmUserfault, GUEST_MEMFD, 9);
    }
    if features.guest_memfd_flags != 0 {
        return skip_without_patch("KVM Userfault for guest_memfd");
    }
    test(Some(kernel), |kernel| {
        let mut vmm = Command::new(program("demand-vmm")?);
        vmm.args(["run", "--memory", "size=192M,backing=guest-memfd", "--kernel"]);
        let mut refusals = Refusals::new();
        let words = ["guest-memfd", "Linux 6.18"];
        refusals.check("no guest_memfd", vmm.arg(kernel.image), HOST, &words);
        refusals.end();
        Ok(())
    });
}

/// Post-copy cannot trap a back-end's accesses to a guest_memfd: the back-end is refused, unless it
/// gets the memory once all of it is present.
#[test]
fn back_end_on_guest_memfd_needs_all_memory() {
    let Some(kernel) = Kernel::lab() else { return };
    if !demand_kvm::probe().kvm.unwrap().guest_memfd_userfault.works() {
        // The test above tells of that.
        return;
    }
    test(Some(kernel), |kernel| {
        let temporary = tempfile::tempdir()?;
        let at = |name: &str| temporary.path().join(name);
        let mut life = Life::boot(&at("life"), &birth(kernel, 2, "size=192M,backing=guest-memfd"))?;
        life.wait_beats(2)?;
        let status = life.guest().api().status()?;
        ensure!(status.limits.len() == 3, "{status:?}");
        let moment = life.stop_at(&at("moment"))?;
        drop(life);
        let options = BlkOptions { queues: 1, queue_size: 256, postcopy: true };
        let back_end = BackEnd::vhost_device_blk(temporary.path(), &moment.disk(), &options)?;
        let mut vmm = Command::new(program("demand-vmm")?);
        vmm.args(["restore", "--source"]).arg(moment.snapshot());
        vmm.arg("--vhost-user").arg(format!("blk,socket={}", back_end.socket().display()));
        let mut refusals = Refusals::new();
        let words = ["no userfaultfd traps accesses to guest-memfd", "lazy=fill"];
        refusals.check("post-copy", &mut vmm, FAILED, &words);
        refusals.end();
        drop(back_end);
        let rebirth = Rebirth {
            engine: Engine::KvmUserfault.name(),
            fill: "off",
            disk: ",lazy=fill",
            ..Rebirth::default()
        };
        let mut life = moment.restore(&at("filled"), &rebirth)?;
        life.wait_work()?;
        let status = life.guest().api().status()?;
        ensure!(status.pages_present == status.pages_total, "{status:?}");
        life.finish()?;
        Ok(())
    });
}

fn birth(kernel: Kernel, cpus: u32, memory: &str) -> Birth {
    Birth { kernel, cpus, memory: memory.into(), journal: Journal::Ext4, net: false, reseeds: true }
}

/// Tests one moment of one kind, for combinations that are too slow or too large for all moments.
fn one(birth: &Birth, engine: Engine, restored: &'static str) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let at = |name: &str| temporary.path().join(name);
    let mut life = Life::boot(&at("life"), birth)?;
    life.wait_beats(2)?;
    let moment = life.stop_at(&at("moment"))?;
    drop(life);
    let rebirth =
        Rebirth { engine: engine.name(), memory: restored, fill: "off", ..Rebirth::default() };
    comes_back(&moment, &at("restored"), &rebirth)
}

#[test]
fn kvm_attributes_on_shmem() {
    test(Kernel::lab(), |kernel| one(&birth(kernel, 2, "size=192M"), Engine::KvmAttributes, SHMEM));
}

#[test]
fn kvm_userfault_on_hugetlb_1g() {
    test(Kernel::lab(), |kernel| {
        one(&birth(kernel, 2, "size=1G"), Engine::KvmUserfault, HUGETLB_1G)
    });
}

#[test]
fn debians_kernel() {
    test(Kernel::debian(), |kernel| {
        // It has no driver for VMGENID.
        let birth = Birth { reseeds: false, ..birth(kernel, 4, "size=384M") };
        one(&birth, Engine::KvmUserfault, HUGETLB_2M)
    });
}

/// Makes a directory read-only, even for root.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(path: PathBuf) -> Result<Self> {
        mount(&["mount", "--bind"], &[&path, &path])?;
        let this = ReadOnly(path);
        mount(&["mount", "-o", "remount,bind,ro"], &[&this.0])?;
        ensure!(File::create(this.0.join("new")).is_err(), "{:?} can be written to", this.0);
        Ok(this)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = mount(&["umount"], &[&self.0]);
    }
}

fn mount(command: &[&str], paths: &[&Path]) -> Result<()> {
    let status = Command::new(command[0]).args(&command[1..]).args(paths).status()?;
    ensure!(status.success(), "{command:?} {paths:?} ended with {status}");
    Ok(())
}

/// Returns a directory's files, with the size and a hash of each.
fn fingerprint(folder: &Path) -> Result<Vec<(PathBuf, u64, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let (mut hash, mut buffer) = (twox_hash::XxHash3_64::new(), vec![0; 1 << 20]);
        let (mut file, mut size) = (File::open(&path)?, 0);
        loop {
            let length = file.read(&mut buffer)?;
            if length == 0 {
                break;
            }
            hash.write(&buffer[..length]);
            size += length as u64;
        }
        files.push((path, size, hash.finish()));
    }
    files.sort();
    Ok(files)
}

/// A chain of snapshots of guests whose memory is still missing: each is restored from the previous
/// one, with another engine or on other memory.
#[test]
fn a_chain_of_snapshots_while_still_lazy() {
    const LINKS: [(Engine, &str, &str); 5] = [
        (Engine::KvmUserfault, SHMEM, "off"),
        (Engine::Uffd, HUGETLB_2M, "off"),
        (Engine::KvmUserfault, HUGETLB_2M, "rate=64K"),
        (Engine::Uffd, SHMEM_THP, "off"),
        (Engine::KvmUserfault, SHMEM, "off"),
    ];
    test(Kernel::lab(), |kernel| {
        transparent_huge_pages();
        let temporary = tempfile::tempdir()?;
        let at = |name: &str| temporary.path().join(name);
        let mut life = Life::boot(&at("life"), &birth(kernel, 2, "size=192M"))?;
        life.wait_beats(2)?;
        let mut moment = life.stop_at(&at("moment"))?;
        drop(life);
        let mut first = None;
        for (link, (engine, memory, fill)) in LINKS.into_iter().enumerate() {
            let rebirth = Rebirth { engine: engine.name(), memory, fill, ..Rebirth::default() };
            let next = lazy_link(&moment, &rebirth, &at(&format!("link{link}")))
                .with_context(|| format!("link {link}, {rebirth:?}"))?;
            let before = std::mem::replace(&mut moment, next);
            if link == 0 {
                first = Some(before);
            } else {
                // Each snapshot is self-contained.
                std::fs::remove_dir_all(before.snapshot())?;
            }
        }
        let rebirth = Rebirth {
            engine: Engine::KvmUserfault.name(),
            memory: SHMEM,
            fill: "on",
            ..Rebirth::default()
        };
        comes_back(&moment, &at("last"), &rebirth).context("the last of the chain")?;
        let first = first.context("there is a first link")?;
        comes_back(&first, &at("again"), &rebirth).context("the first of the chain, once more")
    });
}

/// Restores a guest from a read-only snapshot, and takes the next one before the guest's memory has
/// arrived. Neither operation changes the former snapshot, and the latter does not fetch memory.
fn lazy_link(moment: &Moment, rebirth: &Rebirth, folder: &Path) -> Result<Moment> {
    /// Pages that requests in flight may need, which are answered first: back-ends fetch 2 MiB per
    /// fault, and with slow storage more of them are in flight.
    const NEEDED: u64 = 6 * 512;
    let before = fingerprint(&moment.snapshot())?;
    let read_only = ReadOnly::new(moment.snapshot())?;
    let mut life = moment.restore(folder, rebirth)?;
    life.wait_work()?;
    life.guest().api().pause()?;
    let present = |status: Status| (status.pages_present, status.pages_total);
    let (paused, total) = present(life.guest().api().status()?);
    ensure!(paused > 0 && paused < total, "{paused} of {total} pages are present");
    let next = life.stop_at(&folder.join("moment"))?;
    let (taken, _) = present(life.guest().api().status()?);
    ensure!(
        taken <= paused + NEEDED && taken < total,
        "the snapshot made memory arrive: {paused} of {total} pages were present, now {taken}"
    );
    println!("{paused} of {total} pages were present before the snapshot, then {taken}");
    drop(life);
    drop(read_only);
    ensure!(fingerprint(&moment.snapshot())? == before, "the snapshot has changed");
    Ok(next)
}
