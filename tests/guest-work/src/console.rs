// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console: lines out, commands in, and the end of the machine.

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
/// How the kernel restarts the machine.
const REBOOT_TYPE: &str = "/sys/kernel/reboot/type";
/// An immediate action of the kernel, by its letter.
const SYSRQ: &str = "/proc/sysrq-trigger";

static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();

/// Opens the console for [`say`]; what comes in is not echoed, which would mix with what goes out.
pub fn open() -> Result<()> {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open(PATH)
        .with_context(|| format!("{PATH} could not be opened"))?;
    let mut modes = tcgetattr(&console).context("the console is no terminal")?;
    modes.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&console, OptionalActions::Now, &modes)?;
    // The only call, before there are threads.
    let _ = CONSOLE.set(Mutex::new(console));
    Ok(())
}

/// Says a line.
pub fn say(line: &Line) {
    // Before the console could be opened there is only what the kernel gave.
    let Some(console) = CONSOLE.get() else {
        eprintln!("{line}");
        return;
    };
    let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
    // In one piece; and there is nobody else to tell that it could not be said.
    let _ = console.write_all(format!("{line}\n").as_bytes());
}

/// Says what is wrong and turns the machine off. Only the first one is heard.
pub fn wrong(what: &str, why: &str) -> ! {
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
pub fn reset(by: ResetBy) -> ! {
    if let Some(word) = by.word()
        && let Err(error) = fs::write(REBOOT_TYPE, word)
    {
        wrong("work", &format!("{word:?} could not be written to {REBOOT_TYPE}: {error}"));
    }
    end(RebootCommand::Restart)
}

/// Makes the kernel panic.
pub fn panic() -> ! {
    let why = match fs::write(SYSRQ, "c") {
        Ok(()) => "the kernel did not panic".into(),
        Err(error) => format!("\"c\" could not be written to {SYSRQ}: {error}"),
    };
    wrong("work", &why)
}

/// Ends the machine once all that was said is out.
pub fn end(how: RebootCommand) -> ! {
    if let Some(console) = CONSOLE.get() {
        let _ = tcdrain(&*console.lock().unwrap_or_else(PoisonError::into_inner));
    }
    // It does not come back. If it fails, there is nothing left to do but to stay.
    let _ = reboot(how);
    loop {
        thread::park();
    }
}

/// Commands, as they come. What is none ends the work.
pub fn commands() -> Receiver<Command> {
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
        // The line was hung up. Nothing more can be told; the work goes on.
        loop {
            thread::park();
        }
    });
    commands
}
