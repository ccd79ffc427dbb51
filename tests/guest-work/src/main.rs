// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `guest-work`: the init program of a test's Linux guest. It sets the guest up, does the work that
//! the kernel's command line requests, and turns the machine off. The library describes its input
//! and output.
//!
//! It must not exit: the kernel panics without its init program. Every failure is reported on the
//! console, and ends with the machine turned off.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod block;
mod clock;
mod console;
mod echo;
mod file;
mod journal;
mod kernel_log;
mod memory;
mod network;
mod prove;
mod setup;

use std::fs;
use std::panic;
use std::process::ExitCode;

use guest_work::{Command, Line, Work};
use rustix::system::RebootCommand;

use crate::console::{say, wrong};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "guest-work: this turns the machine off when it is done, so it runs only as the first program of a test's guest (see tests/guest-work)"
        );
        return ExitCode::from(2);
    }
    // The failure of a thread must not go unnoticed.
    panic::set_hook(Box::new(|panic| wrong("work", &panic.to_string())));
    if let Err(error) = setup::machine() {
        wrong("work", &format!("{error:#}"));
    }
    let work = fs::read_to_string("/proc/cmdline")
        .map_err(|error| format!("/proc/cmdline could not be read: {error}"))
        .and_then(|line| Work::of_command_line(&line))
        .unwrap_or_else(|error| wrong("work", &error));
    kernel_log::watch();
    let commands = console::commands();
    match &work {
        Work::Idle => {
            say(&setup::ready());
            for command in commands {
                match command {
                    Command::Stop => break,
                    Command::Reset(by) => console::reset(by),
                    Command::Panic => console::panic(),
                    Command::Halt => console::end(RebootCommand::Halt),
                    // An idle guest has nothing that they could affect.
                    Command::Jump | Command::Poke => {}
                }
            }
            let complaints = kernel_log::complaints();
            say(&Line::Done { pages: 0, records: 0, echoes: 0, lost: 0, complaints });
        }
        Work::Prove(asked) => prove::run(asked, &commands),
    }
    console::end(RebootCommand::PowerOff)
}
