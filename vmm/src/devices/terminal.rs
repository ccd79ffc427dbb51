// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The user's terminal as the guest's console: all keys go to the guest, except one sequence.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Raw mode of standard input, if that is a terminal. Dropping it restores the previous mode.
#[derive(Debug)]
pub struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawTerminal(None));
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Output processing stays on, because this program prints lines, too.
        raw.output_modes = before.output_modes;
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(RawTerminal(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // An error cannot be reported any more.
            let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, before);
        }
    }
}

/// The first byte of the sequence: Ctrl-A, as in other VMMs.
const ESCAPE: u8 = 0x01;

/// A filter for typed bytes on their way to the guest.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
    is_terminal: bool,
}

/// Input from the user.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
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
    pub fn new() -> Self {
        Keys { escaped: false, is_terminal: io::stdin().is_terminal() }
    }

    /// Reads the available input.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub fn read(&mut self) -> io::Result<Typed> {
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
