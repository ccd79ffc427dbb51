// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The agent: process 1 in the lab once the host's root is mounted. It completes the mounts, runs
//! the command, forwards its output, and reports its exit status.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Resource, Rlimit, WaitOptions, setpriority_process, setrlimit, wait};

use crate::protocol::{self, CONTROL_PORT, Job, OUT_TAG, Report, STDERR_PORT, STDOUT_PORT};

/// Bits of /proc/sys/kernel/tainted that count as complaints: an oops or BUG, a WARN, a soft
/// lockup.
const COMPLAINTS: u64 = 1 << 7 | 1 << 9 | 1 << 14;

/// Runs the agent. The host kills the machine at the end, so this returns only if an error cannot
/// be reported to the host.
pub(crate) fn main() -> Result<u8> {
    mount_own()?;
    let mut control = open_port(CONTROL_PORT)?;
    let outcome = serve(&mut control);
    if let Err(error) = outcome {
        protocol::send(&mut control, &Report::Failed(format!("{error:#}")))?;
    }
    loop {
        thread::park();
    }
}

fn serve(control: &mut File) -> Result<()> {
    let stdout = open_port(STDOUT_PORT)?;
    let stderr = open_port(STDERR_PORT)?;
    let job: Job = protocol::receive(&mut BufReader::new(&*control))?
        .context("the host gave the agent no job")?;
    // A nudge only has to cause an interrupt, so its bytes are dropped.
    let mut nudges = control.try_clone()?;
    thread::spawn(move || io::copy(&mut nudges, &mut io::sink()));
    mount_out(&job.out)?;
    set_up()?;
    if job.network {
        join_network()?;
    }
    check_pool("2048kB", job.hugepages)?;
    check_pool("1048576kB", job.gigapages)?;
    let mut streams = Streams::new(stdout, stderr)?;
    let status = run(&job, &mut streams, control)?;
    // The command's files in the shared folder must be on the host before the machine is killed.
    rustix::fs::sync();
    let report = Report::Ended {
        status,
        stdout: streams.pumps[0].sent,
        stderr: streams.pumps[1].sent,
        complaint: complaint()?,
    };
    protocol::send(control, &report)
}

/// Mounts the machine's own file systems. /tmp and /var/tmp show the host's files, because binaries
/// may be there, below a writable layer in memory.
fn mount_own() -> Result<()> {
    let none = MountFlags::empty();
    put("proc", "/proc", "proc", none, "")?;
    put("sysfs", "/sys", "sysfs", none, "")?;
    put("devtmpfs", "/dev", "devtmpfs", none, "")?;
    for folder in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(folder).with_context(|| format!("{folder} could not be created"))?;
    }
    // Names that udev would create.
    symlink("/proc/self/fd", "/dev/fd")?;
    for (number, name) in ["stdin", "stdout", "stderr"].iter().enumerate() {
        symlink(format!("/proc/self/fd/{number}"), format!("/dev/{name}"))?;
    }
    put("devpts", "/dev/pts", "devpts", none, "ptmxmode=0666")?;
    put("tmpfs", "/dev/shm", "tmpfs", none, "mode=1777")?;
    put("debugfs", "/sys/kernel/debug", "debugfs", none, "")?;
    put("cgroup2", "/sys/fs/cgroup", "cgroup2", none, "")?;
    for folder in ["/tmp", "/var/tmp"] {
        let layer = format!("/run/lab{folder}");
        let (upper, work) = (format!("{layer}/upper"), format!("{layer}/work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!("lowerdir={folder},upperdir={upper},workdir={work}");
        put("overlay", folder, "overlay", none, &options)?;
    }
    Ok(())
}

/// Mounts the writable shared folder at the same path as on the host.
fn mount_out(out: &OsStr) -> Result<()> {
    let path = Path::new(out);
    if !path.exists() {
        fs::create_dir_all(path).with_context(|| {
            format!("LAB_OUT={} is hidden in the lab: choose another folder", path.display())
        })?;
    }
    // With write-through, so that the host sees each write at once.
    let options = "trans=virtio,version=9p2000.L,cache=mmap,msize=512000";
    put(OUT_TAG, path, "9p", MountFlags::empty(), options)
}

fn put(
    source: &str,
    target: impl AsRef<Path>,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<()> {
    let target = target.as_ref();
    let options = std::ffi::CString::new(options)?;
    mount(source, target, kind, flags, options.as_c_str())
        .with_context(|| format!("{kind} could not be mounted on {}", target.display()))
}

fn set_up() -> Result<()> {
    fs::write("/proc/sys/kernel/hostname", "lab")?;
    // Enables the loopback interface: IFF_UP.
    fs::write("/sys/class/net/lo/flags", "0x1")?;
    // The kernel's default hard limit, 4096, is lower than that of most hosts.
    let files = Rlimit { current: Some(1024), maximum: Some(1 << 20) };
    setrlimit(Resource::Nofile, files)?;
    hurry_collapse()
}

/// Takes the address that QEMU's network has for its machine. The host is 10.0.2.2 there.
fn join_network() -> Result<()> {
    let arguments = ["ifconfig", "eth0", "10.0.2.15", "netmask", "255.255.255.0", "up"];
    let output = Command::new("busybox").args(arguments).output().context("busybox did not run")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("the network card could not be set up: {}", said.trim_end());
    }
    Ok(())
}

/// Raises khugepaged, the kernel thread that collapses pages into huge ones, from the lowest
/// priority to the default. It yields between the start and the end of an MMU notifier
/// invalidation, and a vCPU that needs one of the pages retries until the invalidation ends. On one
/// CPU, both vCPUs of a guest did nothing else for a minute, and left khugepaged one or two percent
/// of the CPU.
fn hurry_collapse() -> Result<()> {
    for process in fs::read_dir("/proc")?.flatten() {
        let name = process.file_name();
        let Some(id) = name.to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
            continue;
        };
        let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == "khugepaged" {
            setpriority_process(Some(id), 0).context("khugepaged could not be hurried")?;
        }
    }
    Ok(())
}

/// Checks that the kernel reserved as many huge pages as requested: it reserves as many as it can
/// and reports no error.
fn check_pool(size: &str, wanted: u64) -> Result<()> {
    if wanted == 0 {
        return Ok(());
    }
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}/nr_hugepages");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} could not be read"))?;
    let reserved: u64 = text.trim().parse()?;
    if reserved < wanted {
        bail!(
            "{wanted} huge pages of {size} were asked for, {reserved} could be reserved: give the machine more memory (--memory, LAB_MEMORY)"
        );
    }
    Ok(())
}

/// Opens the virtio port with this name; ports appear a moment after their device.
fn open_port(name: &str) -> Result<File> {
    for _ in 0..1000 {
        for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
            let path = entry.path();
            let found = fs::read_to_string(path.join("name")).unwrap_or_default();
            if found.trim_end() == name {
                let device = Path::new("/dev").join(entry.file_name());
                // NOCTTY as a precaution; a port is not a terminal.
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(OFlags::NOCTTY.bits().cast_signed())
                    .open(&device)
                    .with_context(|| format!("{} could not be opened", device.display()));
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("the machine has no port {name}")
}

/// Runs the command to its end and forwards its output; returns its exit status.
fn run(job: &Job, streams: &mut Streams, control: &mut File) -> Result<u8> {
    let (program, arguments) = job.command.split_first().context("no command was given")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(job.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&job.directory)
        .stdin(Stdio::null())
        .stdout(streams.pumps[0].end()?)
        .stderr(streams.pumps[1].end()?);
    if !Path::new(&job.directory).is_dir() {
        bail!(
            "the working directory {} is not to be seen in the lab (it has its own /run, /dev, /proc and /sys)",
            Path::new(&job.directory).display()
        );
    }
    protocol::send(&mut *control, &Report::Started)?;
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            // The statuses of a shell: 127 for not found, 126 for not executable.
            let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            let line = format!("lab: {}: {error}\n", Path::new(program).display());
            streams.pumps[1].send(line.as_bytes())?;
            return Ok(status);
        }
    };
    drop(command);
    let (ended, ends) = io::pipe()?;
    let child = Pid::from_child(&child);
    let reaper = thread::spawn(move || reap(child, ends));
    streams.pump_until(&ended)?;
    let status = reaper.join().map_err(|_| anyhow::anyhow!("the reaper died"))??;
    // Other processes are not killed: the machine ends soon.
    Ok(exit_status(status))
}

/// Waits for the child, and reaps orphans, which is the duty of process 1.
fn reap(child: Pid, ends: PipeWriter) -> Result<ExitStatus> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => {
                drop(ends);
                return Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("the command could not be waited for: {error}"),
        }
    }
}

fn exit_status(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// The command's two output streams, each a pipe whose content is copied to a port. The command
/// does not get the port itself, because a port can be opened only once, and opening /dev/stdout
/// would open it again.
struct Streams {
    pumps: [Pump; 2],
}

struct Pump {
    pipe: PipeReader,
    end: Option<PipeWriter>,
    port: File,
    sent: u64,
    open: bool,
}

impl Streams {
    fn new(stdout: File, stderr: File) -> Result<Self> {
        Ok(Self { pumps: [Pump::new(stdout)?, Pump::new(stderr)?] })
    }

    /// Copies output until `ended` is closed and the pipes are empty. Orphans may keep the pipes
    /// open forever; their later output is dropped.
    fn pump_until(&mut self, ended: &PipeReader) -> Result<()> {
        loop {
            // A closed pipe would always be ready.
            let open = self.pumps.iter().filter(|pump| pump.open);
            let mut ready: Vec<_> = std::iter::once(ended)
                .chain(open.map(|pump| &pump.pipe))
                .map(|pipe| PollFd::new(pipe, PollFlags::IN))
                .collect();
            match poll(&mut ready, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let done = !ready[0].revents().is_empty();
            for pump in &mut self.pumps {
                pump.drain()?;
            }
            if done {
                return Ok(());
            }
        }
    }
}

impl Pump {
    fn new(port: File) -> Result<Self> {
        let (pipe, end) = io::pipe()?;
        let flags = fcntl_getfl(pipe.as_fd())?;
        fcntl_setfl(pipe.as_fd(), flags | OFlags::NONBLOCK)?;
        Ok(Self { pipe, end: Some(end), port, sent: 0, open: true })
    }

    fn end(&mut self) -> Result<PipeWriter> {
        self.end.take().context("the pipe was given away already")
    }

    /// Forwards everything that is in the pipe now.
    fn drain(&mut self) -> Result<()> {
        let mut buffer = [0; 32768];
        while self.open {
            match self.pipe.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(n) => self.send(&buffer[..n])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.port.write_all(bytes).context("output was not sent")?;
        self.sent += bytes.len() as u64;
        Ok(())
    }
}

/// Returns the kernel log from its first complaint on, or `None` if there is no complaint.
fn complaint() -> Result<Option<String>> {
    let tainted = fs::read_to_string("/proc/sys/kernel/tainted")?;
    let tainted: u64 = tainted.trim().parse()?;
    if tainted & COMPLAINTS == 0 {
        return Ok(None);
    }
    let mut kmsg = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/kmsg")?;
    let mut text = String::new();
    let mut record = [0; 8192];
    // Each read returns one record: "prefix;message\n", and possibly more lines.
    loop {
        match kmsg.read(&mut record) {
            Ok(n) => text += message(&String::from_utf8_lossy(&record[..n])),
            // EPIPE: records were overwritten before they were read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
        text.push('\n');
    }
    Ok(Some(from_first_complaint(&text).to_owned()))
}

fn message(record: &str) -> &str {
    let line = record.lines().next().unwrap_or_default();
    line.split_once(';').map_or(line, |(_, message)| message)
}

fn from_first_complaint(log: &str) -> &str {
    ["---[ cut here ]---", "WARNING:", "BUG:", "Oops:"]
        .iter()
        .filter_map(|mark| log.find(mark))
        .min()
        .map_or(log, |at| {
            let start = log[..at].rfind('\n').map_or(0, |end| end + 1);
            log[start..].trim_end()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_a_shells() {
        assert_eq!(exit_status(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn records_of_the_kernel_log_lose_their_prefix() {
        assert_eq!(message("4,700,123456,-;a; b\n SUBSYSTEM=x\n"), "a; b");
    }

    #[test]
    fn a_complaint_starts_at_its_mark() {
        let log = "boot\nready\n------------[ cut here ]------------\nWARNING: CPU: 0\n";
        assert!(from_first_complaint(log).starts_with("------------[ cut here"));
        assert_eq!(from_first_complaint("odd\n"), "odd\n");
    }
}
