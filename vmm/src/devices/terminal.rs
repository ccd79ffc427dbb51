// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The user's terminal as the guest's console: all keys go to the guest, except one sequence.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::Mutex;

use log::LevelFilter;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

use crate::logger::say;
use crate::sync::LockExt;

/// The mode of standard input, which all threads of the process share.
#[derive(Debug)]
enum Mode {
    /// No guest has it as its console.
    Unused,
    /// A guest may make it raw.
    Line,
    /// It is raw; its mode before.
    Raw(Box<Termios>),
}

static MODE: Mutex<Mode> = Mutex::new(Mode::Unused);

/// Standard input as the console of a guest, whose keys it gets between [`make_raw`] and
/// [`restore`]. Dropping it restores the mode of the terminal, for good.
#[derive(Debug)]
pub(crate) struct Console(());

impl Console {
    /// Makes standard input the console. It is not raw yet, so the user's keys can end a start. If
    /// it is a terminal, a line on standard error names the keys by which the user ends the VM; a log
    /// without warnings omits the line.
    pub(crate) fn new() -> Self {
        *MODE.lock_always() = Mode::Line;
        if io::stdin().is_terminal() && log::max_level() >= LevelFilter::Warn {
            say("the console is the guest's; Ctrl-A x ends the VM");
        }
        Console(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        restore_to(Mode::Unused);
    }
}

/// Makes standard input raw, if it is a terminal and the console of a guest.
///
/// # Errors
///
/// The system's error.
pub(crate) fn make_raw() -> io::Result<()> {
    let (stdin, mut mode) = (io::stdin(), MODE.lock_always());
    if !stdin.is_terminal() || !matches!(*mode, Mode::Line) {
        return Ok(());
    }
    let before = tcgetattr(stdin.as_fd())?;
    let mut raw = before.clone();
    raw.make_raw();
    // Output processing stays on, because this program prints lines, too.
    raw.output_modes = before.output_modes;
    tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
    *mode = Mode::Raw(Box::new(before));
    Ok(())
}

/// Restores the mode of the terminal, if it is raw. Any thread may call this, also as the last act
/// of the process.
pub(crate) fn restore() {
    restore_to(Mode::Line);
}

fn restore_to(next: Mode) {
    let mut mode = MODE.lock_always();
    if let Mode::Raw(before) = &*mode {
        let stdin = io::stdin();
        // In the background, the shell has set the terminal's mode, and the call would stop this
        // process. A terminal that does not control the process has no foreground.
        let in_background = tcgetpgrp(stdin.as_fd()).is_ok_and(|group| group != getpgrp());
        if !in_background {
            // An error cannot be reported any more.
            let _ = tcsetattr(stdin.as_fd(), OptionalActions::Now, before);
        }
    } else if matches!((&*mode, &next), (Mode::Unused, Mode::Line)) {
        return;
    }
    *mode = next;
}

/// The first byte of the sequence: Ctrl-A, as in other VMMs.
const ESCAPE: u8 = 0x01;

/// A filter for typed bytes on their way to the guest.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    escaped: bool,
    is_terminal: bool,
}

/// Input from the user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// The sequence that ends the VM: Ctrl-A, x.
    Quit,
    /// The end of the input.
    End,
}

impl Keys {
    /// Creates a filter for standard input. Only a terminal has a sequence that does not go to the
    /// guest.
    pub(crate) fn new() -> Self {
        Keys { escaped: false, is_terminal: io::stdin().is_terminal() }
    }

    /// Reads the available input.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn read(&mut self) -> io::Result<Typed> {
        let mut bytes = [0; 256];
        // Bypasses the library's buffer, which would keep bytes without making the descriptor
        // readable.
        let count = rustix::io::read(io::stdin(), &mut bytes)?;
        Ok(if count == 0 { Typed::End } else { self.filter(&bytes[..count]) })
    }

    fn filter(&mut self, bytes: &[u8]) -> Typed {
        if !self.is_terminal {
            return Typed::Bytes(bytes.to_vec());
        }
        let mut kept = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') => return Typed::Quit,
                // Ctrl-A twice sends it once.
                (true, _) => kept.push(byte),
                (false, ESCAPE) => self.escaped = true,
                (false, _) => kept.push(byte),
            }
        }
        Typed::Bytes(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sequence_is_not_the_guests() {
        let mut keys = Keys { escaped: false, is_terminal: true };
        assert_eq!(keys.filter(b"ls\r\x03"), Typed::Bytes(b"ls\r\x03".into()));
        assert_eq!(keys.filter(b"a\x01"), Typed::Bytes(b"a".into()));
        assert_eq!(keys.filter(b"\x01x"), Typed::Bytes(b"\x01x".into()));
        assert_eq!(keys.filter(b"\x01"), Typed::Bytes(b"".into()));
        assert_eq!(keys.filter(b"x"), Typed::Quit);
        let mut pipe = Keys { escaped: false, is_terminal: false };
        assert_eq!(pipe.filter(b"\x01x"), Typed::Bytes(b"\x01x".into()));
    }
}
