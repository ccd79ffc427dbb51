// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A terminal for a program, whose keys and screen a test controls.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, LocalModes, Winsize, tcflow, tcgetattr, tcsetwinsize};

/// Time limit for text to appear: guests are emulated, twice.
const PATIENCE: Duration = Duration::from_secs(120);

/// A terminal of 100 columns.
#[derive(Debug)]
pub struct PseudoTerminal {
    keys: File,
    /// The program's side; kept open, so that it lasts from one program to the next.
    line: File,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl PseudoTerminal {
    /// Creates an unused terminal.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> Result<Self> {
        let ours: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let path = ptsname(&ours, Vec::new())?.into_string()?;
        let line =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
        tcsetwinsize(&line, Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 })?;
        let (keys, screen) = (File::from(ours), Arc::new(Mutex::new(Vec::new())));
        let (mut shown, seen) = (keys.try_clone()?, screen.clone());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The read fails when the other side is closed everywhere.
            while let Ok(count) = shown.read(&mut bytes) {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.extend_from_slice(&bytes[..count]);
            }
        });
        Ok(PseudoTerminal { keys, line, screen })
    }

    /// Makes `command` run on it: all three standard streams refer to it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn attach(&self, command: &mut Command) -> Result<()> {
        let line = || self.line.try_clone();
        command.stdin(line()?).stdout(line()?).stderr(line()?);
        command.env("TERM", "xterm");
        Ok(())
    }

    /// Makes `command` run on it, as a shell would: it is the terminal of the program's session, so
    /// keys such as Ctrl-C send signals.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn control(&self, command: &mut Command) -> Result<()> {
        self.attach(command)?;
        let take = || {
            rustix::process::setsid()?;
            // SAFETY: `attach` has made the terminal standard input, which stays open.
            let stdin = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
            Ok(rustix::process::ioctl_tiocsctty(stdin)?)
        };
        // SAFETY: the closure makes two system calls, and allocates nothing.
        unsafe { command.pre_exec(take) };
        Ok(())
    }

    /// Suspends the display of output, as Ctrl-S does: programs that write wait.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn suspend(&self) -> Result<()> {
        Ok(tcflow(&self.line, Action::OOff)?)
    }

    /// Types keys.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn type_keys(&self, keys: &[u8]) -> Result<()> {
        Ok((&self.keys).write_all(keys)?)
    }

    /// Returns whether keys are passed on as they are typed, without line editing and signals.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn is_raw(&self) -> Result<bool> {
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        Ok(!tcgetattr(self.line.as_fd())?.local_modes.intersects(cooked))
    }

    /// Returns everything shown so far.
    pub fn shown(&self) -> String {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&screen).into_owned()
    }

    /// Waits until `text` has been shown.
    ///
    /// # Errors
    ///
    /// If that does not happen in time.
    pub fn wait_shown(&self, text: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.shown().contains(text) {
            let shown = || self.shown();
            ensure!(begun.elapsed() < PATIENCE, "{text:?} was not shown, but {:?}", shown());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
