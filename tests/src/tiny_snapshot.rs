// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot of a guest of one instruction, which needs no nested paging.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use demand_kvm::Virtualization;
use demand_source::{Destination, HashedImage, ImageWriter, PageSource};
use demand_vmm::api::client::Client;
use demand_vmm::api::{Go, SnapshotRequest, State};
use test_support::host::{has_kvm, skip};
use test_support::wait::until;

use crate::process::{Guarded, program, succeed};
use crate::tiny_kernel::{LOOP, START, pvh_kernel};

/// Length of the generation id in the guest's memory, in bytes.
const GENERATION_ID: usize = 16;

/// A snapshot of a guest with 64 MiB of memory, in a folder for other files as well.
#[derive(Debug)]
pub struct TinySnapshot(tempfile::TempDir);

impl TinySnapshot {
    /// Number of pages of the guest's memory.
    pub const PAGES: u64 = 64 << 20 >> 12;
    /// Offset in the guest's memory of the first byte that it does not use.
    pub const UNUSED: u64 = 32 << 20;

    /// Takes a snapshot of a guest with a disk behind each of `disks`, sockets of back-ends. Returns
    /// `None` if this machine has no KVM that restores a guest.
    ///
    /// # Errors
    ///
    /// If the guest cannot be run.
    pub fn take(disks: &[&Path]) -> Result<Option<Self>> {
        if !has_kvm() {
            skip("there is no usable /dev/kvm");
            return Ok(None);
        }
        if demand_kvm::probe().virtualization == Virtualization::Emulated {
            skip("an emulating KVM restores no processor");
            return Ok(None);
        }
        let taken = TinySnapshot(tempfile::tempdir()?);
        fs::write(taken.at("kernel"), pvh_kernel(LOOP))?;
        let mut command = Command::new(program("demand-vmm")?);
        command.args(["run", "--memory", "64M", "--serial", "off", "--kernel"]);
        command.arg(taken.at("kernel")).arg("--api-socket").arg(taken.socket());
        with_disks(&mut command, disks);
        let mut vmm = Guarded::spawn(command.stdout(Stdio::null()))?;
        taken.wait_running();
        let request = SnapshotRequest { destination: taken.dir(), then: Some(Go::Shutdown) };
        taken.api().snapshot(&request, |_| {})?;
        let status = vmm.wait(Duration::from_secs(60))?;
        ensure!(status.success(), "{status}");
        Ok(Some(taken))
    }

    /// Returns the path of a file beside the snapshot.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the snapshot's directory.
    pub fn dir(&self) -> PathBuf {
        self.at("snapshot")
    }

    fn socket(&self) -> PathBuf {
        self.at("vm.sock")
    }

    /// Returns a client of the guest's API.
    pub fn api(&self) -> Client {
        Client::new(self.socket())
    }

    /// Returns a restore of the guest with its disks, which serves the API.
    ///
    /// # Errors
    ///
    /// If the program has not been built.
    pub fn restore(&self, disks: &[&Path]) -> Result<Command> {
        self.restore_from(self.dir(), disks)
    }

    /// Returns the same with another source, such as a URL of the snapshot.
    ///
    /// # Errors
    ///
    /// As for [`restore`](Self::restore).
    pub fn restore_from(&self, source: impl AsRef<OsStr>, disks: &[&Path]) -> Result<Command> {
        let mut command = Command::new(program("demand-vmm")?);
        command.arg("restore").arg("--source").arg(source);
        command.arg("--api-socket").arg(self.socket());
        with_disks(&mut command, disks);
        Ok(command)
    }

    /// Waits until a guest runs.
    ///
    /// # Panics
    ///
    /// If it does not in time.
    pub fn wait_running(&self) {
        until("the guest runs", || {
            self.api().status().is_ok_and(|status| status.state == State::Running)
        });
    }

    /// Returns content for [`enlarge`](Self::enlarge), no page of which equals another one.
    pub fn content(bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        for (word, bytes) in content.chunks_mut(8).enumerate() {
            let word = (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        content
    }

    /// Gives the guest's memory content from [`UNUSED`](Self::UNUSED) on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn enlarge(&self, content: &[u8]) -> Result<()> {
        let [memory, hashes] = ["memory", "hashes"].map(|name| self.dir().join(name));
        let [new_memory, new_hashes] = ["memory", "hashes"].map(|name| self.at(name));
        let old = HashedImage::open(&memory, &hashes)?;
        let used = self::memory(&self.dir())?;
        let used = &used[..usize::try_from(Self::UNUSED)?];
        let new = ImageWriter::create(&new_memory, &new_hashes, old.size(), old.generation());
        let mut new = new.context("create an image")?;
        new.write(0, used)?;
        new.write(Self::UNUSED, content)?;
        new.finish()?;
        fs::rename(new_memory, memory)?;
        fs::rename(new_hashes, hashes)?;
        Ok(())
    }

    /// Asserts that the guest's memory in another snapshot of it is the same, except for its
    /// generation id, which a restore changes.
    ///
    /// # Errors
    ///
    /// If one of them cannot be read.
    ///
    /// # Panics
    ///
    /// If it is not the same.
    pub fn expect_memory_of(&self, other: &Path) -> Result<()> {
        let (before, after) = (memory(&self.dir())?, memory(other)?);
        assert_eq!(before.len(), after.len());
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert!(changed <= GENERATION_ID, "{changed} bytes are not the snapshot's");
        Ok(())
    }

    /// Pushes the snapshot to `store/vm7` beside it, and returns the URL.
    ///
    /// # Errors
    ///
    /// If that fails.
    pub fn push(&self) -> Result<String> {
        let place = self.at("store/vm7");
        let mut push = Command::new(program("demand-vmm")?);
        push.args(["image", "push"]).arg(self.dir()).arg(&place);
        succeed(push.stdout(Stdio::null()))?;
        Ok(format!("file://{}", place.display()))
    }

    /// Alters the page that the guest executes, or restores it. Returns its offset in the image.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn flip(&self) -> Result<u64> {
        let memory = File::options().read(true).write(true).open(self.dir().join("memory"))?;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, START + 4000)?;
        memory.write_all_at(&[!byte[0]], START + 4000)?;
        Ok(START)
    }
}

/// Returns the memory in a snapshot's directory, each page of which is checked.
///
/// # Errors
///
/// If it cannot be read, or a page is wrong.
pub fn memory(snapshot: &Path) -> Result<Vec<u8>> {
    let image = HashedImage::open(snapshot.join("memory"), snapshot.join("hashes"))?;
    let mut content = vec![0; usize::try_from(image.size())?];
    image.read_through(0, &mut Destination::from(&mut content[..]))?;
    Ok(content)
}

fn with_disks(command: &mut Command, disks: &[&Path]) {
    for disk in disks {
        command.arg("--vhost-user").arg(format!("blk,socket={}", disk.display()));
    }
}
