// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console: prints lines, reads commands, and ends the machine.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use guest_work::{Command, Line, ResetBy};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::{LocalModes, OptionalActions, tcdrain, tcgetattr, tcsetattr};

const PATH: &str = "/dev/console";
/// The kernel's file for the restart mechanism.
const REBOOT_TYPE: &str = "/sys/kernel/reboot/type";
/// The kernel's file for immediate actions, each named by a letter.
const SYSRQ: &str = "/proc/sysrq-trigger";

static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();

/// Opens the console for [`say`] without echo, which would mix input with output.
pub(crate) fn open() -> Result<()> {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open(PATH)
        .with_context(|| format!("{PATH} could not be opened"))?;
    let mut modes = tcgetattr(&console).context("the console is no terminal")?;
    modes.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&console, OptionalActions::Now, &modes)?;
    // The only call, before threads exist.
    let _ = CONSOLE.set(Mutex::new(console));
    Ok(())
}

/// Prints a line.
pub(crate) fn say(line: &Line) {
    // Before the console is open, only the kernel's standard error is available.
    let Some(console) = CONSOLE.get() else {
        eprintln!("{line}");
        return;
    };
    let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
    // In one write; a failure cannot be reported anywhere.
    let _ = console.write_all(format!("{line}\n").as_bytes());
}

/// Reports an error and turns the machine off. Only the first error is reported.
pub(crate) fn wrong(what: &str, why: &str) -> ! {
    static SAID: AtomicBool = AtomicBool::new(false);
    if SAID.swap(true, Ordering::SeqCst) {
        loop {
            thread::park();
        }
    }
    say(&Line::Wrong { what: what.into(), why: why.replace('\n', "; ") });
    end(RebootCommand::PowerOff)
}

/// Restarts the machine.
pub(crate) fn reset(by: ResetBy) -> ! {
    if let Some(word) = by.word()
        && let Err(error) = fs::write(REBOOT_TYPE, word)
    {
        wrong("work", &format!("{word:?} could not be written to {REBOOT_TYPE}: {error}"));
    }
    end(RebootCommand::Restart)
}

/// Makes the kernel panic.
pub(crate) fn panic() -> ! {
    let why = match fs::write(SYSRQ, "c") {
        Ok(()) => "the kernel did not panic".into(),
        Err(error) => format!("\"c\" could not be written to {SYSRQ}: {error}"),
    };
    wrong("work", &why)
}

/// Ends the machine once all output has been written.
pub(crate) fn end(how: RebootCommand) -> ! {
    if let Some(console) = CONSOLE.get() {
        let _ = tcdrain(&*console.lock().unwrap_or_else(PoisonError::into_inner));
    }
    // It does not return. If it fails, the only option left is to wait.
    let _ = reboot(how);
    loop {
        thread::park();
    }
}

/// Returns a channel of commands as they arrive. An invalid command ends the work.
pub(crate) fn commands() -> Receiver<Command> {
    let (sender, commands) = mpsc::channel();
    thread::spawn(move || {
        let console = File::open(PATH)
            .unwrap_or_else(|error| wrong("work", &format!("{PATH} could not be read: {error}")));
        for line in BufReader::new(console).lines() {
            let line = line.unwrap_or_else(|error| {
                wrong("work", &format!("no command could be read from {PATH}: {error}"))
            });
            match line.trim().parse::<Command>() {
                Ok(command) => {
                    if sender.send(command).is_err() {
                        return;
                    }
                }
                Err(_) if line.trim().is_empty() => {}
                Err(why) => wrong("work", &why),
            }
        }
        // The console was hung up. No more commands can arrive; the work continues.
        loop {
            thread::park();
        }
    });
    commands
}
