// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes that do not outlive the test.

use std::fs;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use test_support::host::threads_of;
use test_support::wait::until;

/// Returns the path of the program `name` of this workspace, in the folder that contains the
/// running program.
///
/// # Errors
///
/// If it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("find the running program")?;
    // Test programs lie one folder deeper than the others.
    let folders = this.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "find {name} near {}: not there; run cargo build --workspace --bins --examples",
            this.display()
        )
    })
}

/// Returns the path of the example program `name` of this workspace.
///
/// # Errors
///
/// If it has not been built.
pub fn example(name: &str) -> Result<PathBuf> {
    program(&format!("examples/{name}"))
}

/// The results of a finished process.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Returns the lines of its standard error, except for the warning that this host's KVM boots no
    /// Linux: the kernels of these tests are their own.
    pub fn complaints(&self) -> String {
        let is_complaint = |line: &&str| !line.contains("an emulating KVM cannot boot");
        self.stderr.split_inclusive('\n').filter(is_complaint).collect()
    }
}

/// A child process that is killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Guarded {
    name: String,
    child: Child,
}

impl Guarded {
    /// Starts a process.
    ///
    /// # Errors
    ///
    /// The system's, with the program's name.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Guarded { name, child })
    }

    /// Returns the process's ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns its exit status if it has ended.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// If it has not ended within `limit`; it is then killed.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if begun.elapsed() > limit {
                let _ = self.child.kill();
                bail!("{} did not end within {limit:?}", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the child, for its standard output and error if they are pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns whether the thread that writes the console of a VMM waits for its reader.
pub fn console_waits(vmm: u32) -> bool {
    let threads = threads_of(vmm);
    let console = threads.split(", ").find(|thread| thread.starts_with("console "));
    // Otherwise it waits for the guest, at a futex, or runs.
    console.is_some_and(|thread| {
        thread.contains(" S in ") && !thread.ends_with(" 0") && !thread.contains("futex")
    })
}

/// Processes that are stopped until this is dropped.
#[derive(Debug)]
pub struct Stopped(Vec<libc::pid_t>);

impl Stopped {
    /// Stops a child process and its children, and waits until they have stopped.
    ///
    /// # Errors
    ///
    /// If `/proc` cannot be read.
    ///
    /// # Panics
    ///
    /// If they do not stop in time.
    pub fn all_of(id: u32) -> Result<Self> {
        let parent = format!("PPid:\t{id}");
        // Not by `children`, which a kernel may lack (CONFIG_PROC_CHILDREN).
        let is_child = |id: &libc::pid_t| {
            let status = fs::read_to_string(format!("/proc/{id}/status"));
            status.is_ok_and(|status| status.lines().any(|line| line == parent))
        };
        let entries = fs::read_dir("/proc")?.filter_map(Result::ok);
        let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let children = processes.filter(is_child);
        let stopped = Stopped([id.cast_signed()].into_iter().chain(children).collect());
        stopped.send(libc::SIGSTOP);
        // Until one of its threads takes the signal, the others run.
        for id in &stopped.0 {
            until("the process stops", || {
                let threads = threads_of(id.cast_unsigned());
                threads == "none" || threads.split(", ").all(|thread| thread.contains(" T in "))
            });
        }
        Ok(stopped)
    }

    fn send(&self, signal: libc::c_int) {
        for id in &self.0 {
            // SAFETY: a signal to one of the test's child processes accesses no memory of this one.
            unsafe { libc::kill(*id, signal) };
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.send(libc::SIGCONT);
    }
}

/// The results of a measured process.
#[derive(Debug)]
pub struct Measured {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard error.
    pub stderr: String,
    /// Its run time.
    pub wall: Duration,
    /// The processor time of all its threads, in user space and in the kernel.
    pub cpu: Duration,
}

/// Runs a process to its end and measures it; its standard output is discarded.
///
/// # Errors
///
/// If it cannot be started, or does not end within `limit`.
pub fn run_measured(command: &mut Command, limit: Duration) -> Result<Measured> {
    let mut stderr = tempfile::tempfile().context("keep what a process says")?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.try_clone()?);
    let name = command.get_program().to_string_lossy().into_owned();
    let begun = Instant::now();
    let child = command.spawn().with_context(|| format!("start {name}"))?;
    let id = libc::pid_t::try_from(child.id())?;
    let (mut late, mut status) = (false, 0);
    // SAFETY: the structure consists of numbers, for which all zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // Only this code reaps the child.
    // SAFETY: the call writes the two structures, and nothing else.
    while unsafe { libc::wait4(id, &mut status, libc::WNOHANG, &mut usage) } == 0 {
        if begun.elapsed() > limit {
            late = true;
            // SAFETY: the child has not been reaped, so its ID has not been reused.
            unsafe { libc::kill(id, libc::SIGKILL) };
        }
        thread::sleep(Duration::from_millis(5));
    }
    let wall = begun.elapsed();
    stderr.rewind()?;
    let mut bytes = Vec::new();
    stderr.read_to_end(&mut bytes)?;
    let stderr = String::from_utf8_lossy(&bytes).into_owned();
    if late {
        bail!("{name} did not end within {limit:?}; it said: {stderr}");
    }
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    Ok(Measured { status: ExitStatus::from_raw(status), stderr, wall, cpu })
}

/// Runs a process to its end and keeps its output.
///
/// # Errors
///
/// If it cannot be started, or does not end within `limit`.
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Guarded::spawn(command)?;
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let child = process.child();
    let stdout = drain(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = drain(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let waited = process.wait(limit);
    drop(process);
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    let status = waited.with_context(|| format!("it said: {stdout}{stderr}"))?;
    Ok(Output { status, stdout, stderr })
}

/// Runs a process that must succeed, within ten minutes.
///
/// # Errors
///
/// If it cannot be started or fails; with all its output.
pub fn succeed(command: &mut Command) -> Result<()> {
    let output = run(command, Duration::from_secs(600))?;
    let name = command.get_program().display();
    let Output { status, stdout, stderr } = output;
    ensure!(status.success(), "{name} ended with {status}: {stdout}{stderr}");
    Ok(())
}
