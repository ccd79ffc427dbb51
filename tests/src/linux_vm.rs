// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux guests under demand-vmm, run as a user would: as separate processes, with a console to
//! read and to type at, and the API's socket.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use demand_vmm::api::client::Client;
use demand_vmm::api::{Go, SnapshotRequest, SnapshotSummary};
use demand_vmm::report::Report;
use guest_work::{Line, Work};

use test_support::host::{is_lab, skip};

use crate::backend::{BackEnd, BlkOptions};
use crate::process::{Guarded, program};

/// Time limit for a guest's silence: it is emulated, twice.
const PATIENCE: Duration = Duration::from_secs(240);

/// Names of files in a guest's folder.
const SOCKET: &str = "api.sock";
const REPORT: &str = "report.json";

/// A kernel and its initial file system.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel's image.
    pub image: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

impl Kernel {
    /// Returns a kernel that `cargo lab --guests` provides; outside the lab, prints the reason and
    /// returns `None`.
    fn named(image: &str, initramfs: &str) -> Option<Self> {
        let given = Self::given(image, initramfs).filter(|_| is_lab());
        if given.is_none() {
            skip("a Linux guest needs the lab (cargo lab test --guests)");
        }
        given
    }

    fn given(image: &str, initramfs: &str) -> Option<Self> {
        let [image, initramfs] = [image, initramfs].map(std::env::var_os);
        Some(Kernel { image: image?.into(), initramfs: initramfs?.into() })
    }

    /// Returns the lab's own kernel, as bzImage, on any machine whose environment has its path.
    pub fn of_environment() -> Option<Self> {
        Self::given("LAB_GUEST_BZIMAGE", "LAB_GUEST_INITRAMFS")
    }

    /// Returns the lab's own kernel, as bzImage; everything is built in, including VMGENID.
    pub fn lab() -> Option<Self> {
        Self::named("LAB_GUEST_BZIMAGE", "LAB_GUEST_INITRAMFS")
    }

    /// Returns the lab's own kernel as ELF, with its PVH entry.
    pub fn lab_elf() -> Option<Self> {
        Self::named("LAB_GUEST_VMLINUX", "LAB_GUEST_INITRAMFS")
    }

    /// Returns Debian's cloud kernel, unmodified: virtio comes as modules in the initramfs, ext4 is
    /// built in, VMGENID is absent.
    pub fn debian() -> Option<Self> {
        Self::named("LAB_GUEST_DEBIAN_BZIMAGE", "LAB_GUEST_DEBIAN_INITRAMFS")
    }
}

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct DiskOption {
    /// The file.
    pub path: PathBuf,
    /// Whether its back-end offers post-copy.
    pub postcopy: bool,
    /// Text appended to `--vhost-user`, for example ",lazy=fill".
    pub more: String,
}

impl DiskOption {
    /// Creates a disk with post-copy.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        DiskOption { path: path.into(), postcopy: true, more: String::new() }
    }
}

/// A network card of a guest, with testpmd behind it.
#[derive(Clone, Debug)]
pub struct CardOption {
    /// Whether its back-end offers post-copy.
    pub postcopy: bool,
    /// Whether its back-end locks its memory, and so touches the guest's memory before it can be
    /// trapped.
    pub locked: bool,
    /// Text appended to `--vhost-user`, for example ",lazy=fill".
    pub more: String,
}

impl Default for CardOption {
    /// Creates a card with post-copy.
    fn default() -> Self {
        CardOption { postcopy: true, locked: false, more: String::new() }
    }
}

/// Options for starting a guest.
#[derive(Clone, Debug, Default)]
pub struct GuestConfig {
    /// `--cpus`, if given.
    pub cpus: u32,
    /// `--memory`.
    pub memory: String,
    /// The disks, by position.
    pub disks: Vec<DiskOption>,
    /// The network cards, which come after the disks.
    pub cards: Vec<CardOption>,
    /// More arguments.
    pub more: Vec<String>,
}

/// A running guest, and its devices' back-ends. All of it is killed when this is dropped.
#[derive(Debug)]
pub struct Guest {
    vmm: Guarded,
    back_ends: Vec<BackEnd>,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    /// All lines of the console so far.
    pub console: Vec<String>,
    /// The file with the VMM's standard error.
    stderr: PathBuf,
    report: PathBuf,
    socket: PathBuf,
}

impl Guest {
    /// Boots a guest; its sockets and files are in `folder`, which no other guest uses.
    ///
    /// # Errors
    ///
    /// If a process cannot be started.
    pub fn boot(folder: &Path, kernel: &Kernel, work: &Work, config: &GuestConfig) -> Result<Self> {
        Self::boot_with(folder, kernel, work, "", config)
    }

    /// Like [`boot`](Self::boot), with more words for the kernel's command line, for example
    /// "mem=512M".
    ///
    /// # Errors
    ///
    /// If a process cannot be started.
    pub fn boot_with(
        folder: &Path,
        kernel: &Kernel,
        work: &Work,
        words: &str,
        config: &GuestConfig,
    ) -> Result<Self> {
        let mut command = Command::new(program("demand-vmm")?);
        command.arg("run").arg("--memory").arg(&config.memory);
        command.arg("--cpus").arg(config.cpus.to_string());
        command.arg("--kernel").arg(&kernel.image).arg("--initramfs").arg(&kernel.initramfs);
        command.arg("--cmdline").arg(format!("console=ttyS0 panic=-1 quiet work={work} {words}"));
        Self::start(folder, command, config)
    }

    /// Restores a guest from `snapshot`.
    ///
    /// # Errors
    ///
    /// If a process cannot be started.
    pub fn restore(folder: &Path, snapshot: &Path, config: &GuestConfig) -> Result<Self> {
        let mut command = Command::new(program("demand-vmm")?);
        command.arg("restore").arg("--source").arg(snapshot);
        if !config.memory.is_empty() {
            command.arg("--memory").arg(&config.memory);
        }
        Self::start(folder, command, config)
    }

    /// Starts a VMM without a VM, for a guest that a client of its API boots or restores.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, or does not serve its API.
    pub fn none_yet(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut command = Command::new(program("demand-vmm")?);
        command.arg("--api-socket").arg(folder.join(SOCKET));
        let guest = Self::spawn(folder, command, Vec::new())?;
        let begun = Instant::now();
        while guest.api().status().is_err() {
            ensure!(begun.elapsed() < PATIENCE, "it serves no API; {}", guest.story());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(guest)
    }

    fn start(folder: &Path, mut command: Command, config: &GuestConfig) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut back_ends = Vec::new();
        for (index, disk) in config.disks.iter().enumerate() {
            let options = BlkOptions { queues: 1, queue_size: 256, postcopy: disk.postcopy };
            let socket = folder.join(format!("blk{index}.sock"));
            let back_end = BackEnd::vhost_device_blk_at(socket, &disk.path, &options)?;
            let socket = back_end.socket().display();
            command.arg("--vhost-user").arg(format!("blk,socket={socket}{}", disk.more));
            back_ends.push(back_end);
        }
        for (index, card) in config.cards.iter().enumerate() {
            let socket = folder.join(format!("net{index}.sock"));
            let back_end = BackEnd::testpmd(socket, card.postcopy, card.locked)?;
            let socket = back_end.socket().display();
            command.arg("--vhost-user").arg(format!("net,socket={socket}{}", card.more));
            back_ends.push(back_end);
        }
        command.arg("--api-socket").arg(folder.join(SOCKET));
        command.arg("--report").arg(folder.join(REPORT)).args(&config.more);
        Self::spawn(folder, command, back_ends)
    }

    fn spawn(folder: &Path, mut command: Command, back_ends: Vec<BackEnd>) -> Result<Self> {
        let (report, socket) = (folder.join(REPORT), folder.join(SOCKET));
        let stderr = folder.join("stderr");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&stderr)?);
        let mut vmm = Guarded::spawn(&mut command)?;
        let stdin = vmm.child().stdin.take();
        let stdout = vmm.child().stdout.take().context("the console")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // A serial console's output need not be text.
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let console = Vec::new();
        Ok(Guest { vmm, back_ends, stdin, lines, console, stderr, report, socket })
    }

    /// Returns a client of the API.
    pub fn api(&self) -> Client {
        Client::new(&self.socket)
    }

    /// Returns the ID of the VMM's process.
    pub fn id(&self) -> u32 {
        self.vmm.id()
    }

    /// Returns the recent output of all processes, for a failed test.
    pub fn story(&self) -> String {
        let said = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        let from = self.console.len().saturating_sub(40);
        let mut story =
            format!("the console:\n{}\nthe VMM:\n{said}", self.console[from..].join("\n"));
        for said in self.back_ends.iter().filter_map(BackEnd::said) {
            story.push_str("\na back-end:\n");
            story.push_str(&said);
        }
        story
    }

    /// Types a line at the console.
    ///
    /// # Errors
    ///
    /// If the VMM has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the console's input")?;
        stdin.write_all(format!("{line}\n").as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Waits for a line of the guest's program for which `wanted` returns a value, and returns that
    /// value.
    ///
    /// # Errors
    ///
    /// If the guest reports an error, ends, or is silent for too long.
    pub fn wait_for<T>(&mut self, mut wanted: impl FnMut(&Line) -> Option<T>) -> Result<T> {
        let mut due = Instant::now() + PATIENCE;
        loop {
            let left = due.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(text) => {
                    due = Instant::now() + PATIENCE;
                    let found = self.take(text, &mut wanted)?;
                    if let Some(found) = found {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest was silent for {PATIENCE:?}; {}", self.story())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    // Its last output may arrive a little later than its end.
                    let _ = self.vmm.wait(Duration::from_secs(5));
                    bail!("the VMM has ended; {}", self.story())
                }
            }
        }
    }

    fn take<T>(
        &mut self,
        text: String,
        wanted: &mut impl FnMut(&Line) -> Option<T>,
    ) -> Result<Option<T>> {
        self.console.push(text.clone());
        // The kernel's own output may precede it on the same line.
        let Some(at) = text.find("guest: ") else { return Ok(None) };
        let Ok(line) = text[at..].parse::<Line>() else { return Ok(None) };
        match &line {
            Line::Wrong { .. } | Line::Kernel(_) => bail!("{line}; {}", self.story()),
            _ => Ok(wanted(&line)),
        }
    }

    /// Waits until the guest is up.
    ///
    /// # Errors
    ///
    /// Those of [`wait_for`](Self::wait_for).
    pub fn wait_ready(&mut self) -> Result<u64> {
        self.wait_for(|line| match line {
            Line::Ready { cpus, .. } => Some(*cpus),
            _ => None,
        })
    }

    /// Waits for `count` beats, and returns the last.
    ///
    /// # Errors
    ///
    /// Those of [`wait_for`](Self::wait_for).
    pub fn wait_beats(&mut self, mut count: u32) -> Result<guest_work::Beat> {
        self.wait_for(|line| match line {
            Line::Beat(beat) => {
                count = count.saturating_sub(1);
                (count == 0).then_some(*beat)
            }
            _ => None,
        })
    }

    /// Returns the last beat among the console's unread lines, without waiting.
    ///
    /// # Errors
    ///
    /// If the guest has reported an error.
    pub fn last_beat(&mut self) -> Result<Option<guest_work::Beat>> {
        let mut last = None;
        while let Ok(text) = self.lines.try_recv() {
            let beat = self.take(text, &mut |line| match line {
                Line::Beat(beat) => Some(*beat),
                _ => None,
            })?;
            last = beat.or(last);
        }
        Ok(last)
    }

    /// Takes a snapshot, and waits for it.
    ///
    /// # Errors
    ///
    /// The VMM's.
    pub fn snapshot(&self, destination: &Path, then: Option<Go>) -> Result<SnapshotSummary> {
        let request = SnapshotRequest { destination: destination.into(), then };
        self.api()
            .snapshot(&request, |_| {})
            .with_context(|| format!("take a snapshot; {}", self.story()))
    }

    /// Kills the VMM and the back-ends at once, as a power failure would.
    pub fn kill(self) {
        drop(self);
    }

    /// Makes the guest stop its work, verify all of it and turn itself off; returns the work done
    /// and the VMM's report.
    ///
    /// # Errors
    ///
    /// If any check fails.
    pub fn finish(mut self) -> Result<(u64, u64, Report)> {
        self.type_line("stop")?;
        let (pages, records) = self.wait_for(|line| match line {
            Line::Done { pages, records, complaints: 0, .. } => Some((*pages, *records)),
            _ => None,
        })?;
        Ok((pages, records, self.ended()?))
    }

    /// Waits for the VMM's end, which must be successful; returns its report.
    ///
    /// # Errors
    ///
    /// If it is not.
    pub fn ended(&mut self) -> Result<Report> {
        let status = self.wait_end()?;
        ensure!(status.success(), "the VMM ended with {status}; {}", self.story());
        for back_end in self.back_ends.drain(..) {
            drop(back_end);
        }
        let text = std::fs::read_to_string(&self.report).context("read the report")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Waits for the VMM's end.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        let status = self.vmm.wait(PATIENCE).with_context(|| self.story());
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.console.push(line);
        }
        status
    }

    /// Returns the VMM's standard error so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Returns the lines of the VMM's standard error so far, except that it waits for a back-end,
    /// as it does for more than a second where the host has much to do.
    pub fn complaints(&self) -> Vec<String> {
        let said = self.said();
        let is_complaint = |line: &&str| !line.contains(": waiting for the back-end at ");
        said.lines().filter(is_complaint).map(Into::into).collect()
    }

    /// Waits until the VMM has written all of these words to its standard error: a log line may
    /// follow the change that it reports.
    ///
    /// # Errors
    ///
    /// If it does not write them.
    pub fn wait_said(&self, words: &[&str]) -> Result<()> {
        let begun = Instant::now();
        loop {
            let said = self.said();
            let missing: Vec<_> = words.iter().filter(|words| !said.contains(**words)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "not said: {missing:?}; {}", self.story());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Returns whether the file contains these bytes at an offset.
    fn has(path: &Path, at: u64, wanted: &[u8]) -> bool {
        let mut found = vec![0; wanted.len()];
        File::open(path).and_then(|file| file.read_exact_at(&mut found, at)).expect("readable");
        found == wanted
    }

    #[test]
    fn kernel_files_match_their_names() {
        let (Some(lab), Some(elf), Some(debian)) =
            (Kernel::lab(), Kernel::lab_elf(), Kernel::debian())
        else {
            return;
        };
        // The magic numbers of the boot protocol, of an ELF file, and of a cpio archive.
        assert!(has(&lab.image, 0x202, b"HdrS"));
        assert!(has(&debian.image, 0x202, b"HdrS"));
        assert!(has(&elf.image, 0, b"\x7fELF"));
        for kernel in [&lab, &elf, &debian] {
            assert!(has(&kernel.initramfs, 0, b"070701"), "{kernel:?}");
        }
    }
}
