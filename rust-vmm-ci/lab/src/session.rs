// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run of a command: starts the machine, sends the agent its job, forwards the command's
//! output, and receives its exit status.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::{Ends, Machine};
use crate::modules::Module;
use crate::protocol::{self, Job, Report};
use crate::{cache, initramfs};

/// Time limit for the boot. A boot takes seconds; the limit allows for a busy host.
const BOOT: Duration = Duration::from_secs(180);
/// Time limit for the last output to arrive after the command has ended.
const DRAIN: Duration = Duration::from_secs(30);
/// Interval at which the host sends the machine an interrupt, which bounds the time that the
/// machine hangs because of a bug in QEMU. When a vCPU leaves a nested guest, QEMU (7.2) clears a
/// flag in a word without a lock, while another thread of QEMU sets flags in the same word.
/// Sometimes the flag of a pending interrupt, mostly that of the only timer, is lost. The interrupt
/// stays pending until another interrupt makes QEMU check again.
const NUDGE: Duration = Duration::from_millis(100);
/// Number of lines of the console that a fault report includes.
const TAIL: usize = 25;

/// The limits of a run.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Time limit of the command.
    pub command: Option<Duration>,
    /// Whether the run may succeed despite a WARN, BUG or oops of the lab's kernel.
    pub allow_warn: bool,
}

/// The end of the command, as the agent reported it.
struct Ending {
    status: u8,
    complaint: Option<String>,
}

enum Event {
    Report(Report),
    /// Bytes passed on from the command's standard output and standard error.
    Copied(usize, usize),
    /// The connection to the agent has ended.
    Gone(Option<anyhow::Error>),
}

/// Runs one command in a new machine and returns its exit status; an error is a fault of the lab.
pub(crate) fn run(
    machine: &Machine,
    kernel: &Path,
    modules: &[Module],
    job: Job,
    limits: &Limits,
) -> Result<u8> {
    let (console, console_end) = UnixStream::pair()?;
    let (control, control_end) = UnixStream::pair()?;
    let (stdout, stdout_end) = UnixStream::pair()?;
    let (stderr, stderr_end) = UnixStream::pair()?;
    let ends = Ends {
        console: console_end.into(),
        control: control_end.into(),
        stdout: stdout_end.into(),
        stderr: stderr_end.into(),
    };
    let mut qemu = machine.start(kernel, initramfs::pack(modules)?, Path::new(&job.out), ends)?;

    let log = Arc::new(Mutex::new(Vec::new()));
    collect(console, &log);
    if let Some(messages) = qemu.stderr.take() {
        collect(messages, &log);
    }
    let (events, inbox) = mpsc::channel();
    copy(stdout, io::stdout(), events.clone(), |n| Event::Copied(n, 0));
    copy(stderr, io::stderr(), events.clone(), |n| Event::Copied(0, n));
    let reports = control.try_clone()?;
    thread::spawn(move || listen(reports, &events));

    // The machine reads the job once it has booted. If it never does, it has died or is too late,
    // which `follow` detects. There are no nudges with `icount`: QEMU's threads then take turns,
    // and runs must be deterministic.
    let nudge = !machine.icount;
    thread::spawn(move || {
        let sent = protocol::send(&control, &job);
        while nudge && sent.is_ok() && protocol::nudge(&control).is_ok() {
            thread::sleep(NUDGE);
        }
    });
    let ending = follow(&inbox, limits);
    // No state inside needs an orderly shutdown.
    let died = stop(&mut qemu, ending.is_err());
    match ending {
        Ok(ending) => judge(ending, limits),
        Err(error) => Err(explain(error, died, &log)),
    }
}

/// Processes the events of the run until its end.
fn follow(inbox: &Receiver<Event>, limits: &Limits) -> Result<Ending> {
    let mut copied = (0, 0);
    let mut deadline = Some((Instant::now() + BOOT, "the machine did not start the command", BOOT));
    let mut ended: Option<(Ending, u64, u64)> = None;
    loop {
        if let Some((_, stdout, stderr)) = ended
            && copied == (stdout, stderr)
        {
            return Ok(ended.expect("it was there a line above").0);
        }
        let event = match deadline {
            None => inbox.recv().context("the session's threads ended")?,
            Some((at, what, limit)) => {
                match inbox.recv_timeout(at.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => {
                        bail!("{what} within {limit:?}")
                    }
                    Err(RecvTimeoutError::Disconnected) => bail!("the session's threads ended"),
                }
            }
        };
        match event {
            Event::Copied(stdout, stderr) => {
                copied.0 += stdout as u64;
                copied.1 += stderr as u64;
            }
            Event::Report(Report::Started) => {
                deadline = limits.command.map(|limit| {
                    (
                        Instant::now() + limit,
                        "the command did not end (--timeout, LAB_TIMEOUT)",
                        limit,
                    )
                });
            }
            Event::Report(Report::Ended { status, stdout, stderr, complaint }) => {
                ended = Some((Ending { status, complaint }, stdout, stderr));
                deadline = Some((Instant::now() + DRAIN, "the last output did not arrive", DRAIN));
            }
            Event::Report(Report::Failed(error)) => bail!("{error}"),
            Event::Gone(Some(error)) => return Err(error),
            Event::Gone(None) => bail!("the machine ended before it said how the command ended"),
        }
    }
}

/// Converts the end of the command into the result of the run.
fn judge(ending: Ending, limits: &Limits) -> Result<u8> {
    if let Some(complaint) = ending.complaint {
        eprintln!("lab: the lab's kernel complained while the command ran:\n{complaint}");
        if !limits.allow_warn {
            bail!(
                "a kernel complaint fails the run (the command itself ended with status {}): mend the kernel patch, or let it pass with --allow-warn or LAB_ALLOW_WARN=1",
                ending.status
            );
        }
    }
    Ok(ending.status)
}

/// Kills the machine. If the machine had already exited, returns its status.
fn stop(qemu: &mut Child, failed: bool) -> Option<String> {
    let mut died = None;
    // QEMU may close its connections a moment before it exits.
    for _ in 0..if failed { 10 } else { 0 } {
        died = qemu.try_wait().ok().flatten();
        if died.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    // Errors mean that the machine has already exited.
    let _ = qemu.kill();
    let _ = qemu.wait();
    died.map(|status| status.to_string())
}

/// Adds QEMU's exit status and the end of the kernel's console to an error.
fn explain(error: anyhow::Error, died: Option<String>, log: &Mutex<Vec<u8>>) -> anyhow::Error {
    // The threads may still be reading the machine's last output.
    thread::sleep(Duration::from_millis(200));
    let log = log.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&log).replace('\r', "");
    let lines: Vec<_> = text.lines().collect();
    let mut message = format!("{error:#}");
    if let Some(died) = died {
        message += &format!(" (QEMU: {died})");
    }
    if lines.is_empty() {
        return anyhow::anyhow!("{message}; the kernel's console is empty");
    }
    let place = match save(&text) {
        Ok(path) => format!("all of it in {path}"),
        Err(error) => format!("it could not be saved: {error:#}"),
    };
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n  ");
    anyhow::anyhow!("{message}; the end of the kernel's console ({place}):\n  {tail}")
}

fn save(text: &str) -> Result<String> {
    let folder = cache::folder("logs")?;
    let path = folder.join(format!("console-{}.log", std::process::id()));
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

/// Starts a thread that collects a stream in memory.
fn collect(mut from: impl Read + Send + 'static, log: &Arc<Mutex<Vec<u8>>>) {
    let log = Arc::clone(log);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            log.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..n]);
        }
    });
}

/// Starts a thread that forwards an output stream of the command, and sends an event with the
/// number of bytes.
fn copy(
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
    events: Sender<Event>,
    event: fn(usize) -> Event,
) {
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            // The command continues even if its reader on the host has gone away.
            let _ = to.write_all(&buffer[..n]).and_then(|()| to.flush());
            if events.send(event(n)).is_err() {
                break;
            }
        }
    });
}

/// Forwards the agent's reports as events.
fn listen(control: UnixStream, events: &Sender<Event>) {
    let mut control = BufReader::new(control);
    loop {
        let event = match protocol::receive(&mut control) {
            Ok(Some(report)) => Event::Report(report),
            Ok(None) => Event::Gone(None),
            Err(error) => Event::Gone(Some(error)),
        };
        let last = matches!(event, Event::Gone(_));
        if events.send(event).is_err() || last {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { command: None, allow_warn: false };

    fn follow_all(events: Vec<Event>, limits: &Limits) -> Result<Ending> {
        let (sender, inbox) = mpsc::channel();
        for event in events {
            sender.send(event).expect("open");
        }
        follow(&inbox, limits)
    }

    fn ended(status: u8, stdout: u64, stderr: u64) -> Event {
        Event::Report(Report::Ended { status, stdout, stderr, complaint: None })
    }

    #[test]
    fn the_end_waits_for_the_output() {
        let events = vec![
            Event::Report(Report::Started),
            Event::Copied(2, 0),
            ended(3, 5, 1),
            Event::Copied(3, 0),
            Event::Copied(0, 1),
        ];
        assert_eq!(follow_all(events, &LIMITS).expect("ended").status, 3);
    }

    #[test]
    fn early_end_of_the_machine_is_a_fault() {
        let events = vec![Event::Report(Report::Started), Event::Gone(None)];
        assert!(follow_all(events, &LIMITS).is_err());
    }

    #[test]
    fn lost_output_is_a_fault() {
        let events = vec![Event::Copied(4, 0), ended(0, 5, 0), Event::Gone(None)];
        assert!(follow_all(events, &LIMITS).is_err());
    }

    #[test]
    fn a_command_may_not_outlast_its_limit() {
        let (sender, inbox) = mpsc::channel();
        sender.send(Event::Report(Report::Started)).expect("open");
        let limits = Limits { command: Some(Duration::from_millis(10)), allow_warn: false };
        let error = follow(&inbox, &limits).err().expect("too long");
        assert!(error.to_string().contains("--timeout"), "{error}");
        drop(sender);
    }

    #[test]
    fn complaint_fails_the_run_unless_allowed() {
        let ending = || Ending { status: 0, complaint: Some("WARNING: CPU: 0".into()) };
        assert!(judge(ending(), &LIMITS).is_err());
        let limits = Limits { command: None, allow_warn: true };
        assert_eq!(judge(ending(), &limits).expect("allowed"), 0);
    }
}
