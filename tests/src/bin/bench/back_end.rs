// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end on demand-paged memory, in two processes: one has the pager and serves the faults,
//! the other touches one word of each unit and prints the time of each touch.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use demand_memory::{Backing, BackingKind, Mapping, MemfdBacking, Pager, PagerConfig, Retrier};
use demand_source::LocalFile;
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, Features, UnitLoader, Userfaultfd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The memory, and the way in which it is touched.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[arg(long)]
    backing: BackingKind,
    /// Size of the memory, in bytes.
    #[arg(long)]
    size: u64,
    /// Distance between touches, in bytes.
    #[arg(long)]
    unit: u64,
    #[arg(long)]
    image: PathBuf,
    /// Path of the memory object, for the process that touches it.
    #[arg(long)]
    memory: Option<PathBuf>,
}

/// Starts a back-end and serves its faults until it ends.
pub(crate) fn serve(options: &Options) -> Result<()> {
    let backing = Arc::new(MemfdBacking::new(options.backing, options.size)?);
    let source = Arc::new(LocalFile::open(&options.image)?);
    let retrier = Retrier::new(Default::default(), |failure| eprintln!("{}", failure.error));
    let pager = Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing.clone(), source) })?;
    UnitLoader::install(&pager)?;
    let service = FaultService::start(DEFAULT_THREADS)?;
    let file = backing.file().context("the memory has a file")?;

    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new(std::env::current_exe()?);
    child.arg("touch").arg("--backing").arg(options.backing.name());
    child.arg("--size").arg(options.size.to_string()).arg("--unit").arg(options.unit.to_string());
    child.arg("--image").arg(&options.image);
    child.arg("--memory").arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    let mut child = child.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;

    let mut base = [0; 8];
    let (len, uffd) = ours.recv_with_fd(&mut base)?;
    let uffd = uffd.filter(|_| len == 8).context("receive the back-end's userfaultfd")?;
    let uffd = Arc::new(Userfaultfd::from_received(uffd.into())?);
    let armed = ArmedMapping::foreign(&uffd, u64::from_ne_bytes(base), &pager)?;
    service.add(&[armed])?;
    ours.write_all(&[1])?;
    let status = child.wait()?;
    ensure!(status.success(), "the back-end ended with {status}");
    Ok(())
}

/// Runs the back-end. Its socket is its standard input.
pub(crate) fn touch(options: &Options) -> Result<()> {
    let memory = options.memory.as_deref().context("say --memory")?;
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let mapping = Mapping::shared(&memory, options.size)?;
    let uffd = Userfaultfd::open(Features::GUEST_MEMORY)?;
    let base = mapping.address().as_ptr() as u64;
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    socket.send_with_fd(&base.to_ne_bytes()[..], uffd.try_clone_fd()?.as_raw_fd())?;
    socket.read_exact(&mut [0])?;
    let image = std::fs::File::open(&options.image)?;
    let mut latencies = Vec::new();
    for unit in 0..options.size / options.unit {
        let offset = unit * options.unit + unit * 136 % 4096;
        let at = mapping.at(offset).cast::<u64>();
        let begun = Instant::now();
        // SAFETY: the word lies in the mapping and is aligned; another process fills it.
        let word = unsafe { at.as_ptr().read_volatile() };
        latencies.push(begun.elapsed().as_nanos());
        let mut expected = [0; 8];
        image.read_exact_at(&mut expected, offset)?;
        ensure!(word == u64::from_ne_bytes(expected), "the word at {offset:#x} is not the image's");
    }
    let lines: String = latencies.iter().map(|latency| format!("{latency}\n")).collect();
    Ok(std::io::stdout().write_all(lines.as_bytes())?)
}

/// Returns the command that measures our back-end.
pub(crate) fn command(backing: BackingKind, size: u64, unit: u64, image: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("back-end").arg("--backing").arg(backing.name()).arg("--image").arg(image);
    command.arg("--size").arg(size.to_string()).arg("--unit").arg(unit.to_string());
    Ok(command)
}
