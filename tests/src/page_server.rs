// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers of a snapshot's pages, as processes that are killed and started again while a guest uses
//! them.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;
use test_support::servers::{Web, program};
use test_support::wait::{listens, until};

use crate::process::{Guarded, example};

/// A server, which is killed when this is dropped.
#[derive(Debug)]
pub enum PageServer {
    /// A web server.
    Web(Web),
    /// A program that listens on a Unix socket.
    Program(Program),
}

/// A program, with what starts it.
pub struct Program {
    command: Box<dyn FnMut() -> Command>,
    process: Option<Guarded>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("process", &self.process).finish_non_exhaustive()
    }
}

impl PageServer {
    /// Returns a program that has not been started. It listens on a Unix socket.
    pub fn new(command: impl FnMut() -> Command + 'static) -> Self {
        PageServer::Program(Program { command: Box::new(command), process: None })
    }

    /// Returns the example pager in Rust, which has all files of a snapshot.
    ///
    /// # Errors
    ///
    /// If it has not been built.
    pub fn pager(snapshot: &Path, socket: &Path) -> Result<Self> {
        Ok(Self::serving(&[&example("pager")?, snapshot, socket]))
    }

    /// Returns the example pager in Python, which has a snapshot's memory, with a staging area.
    /// Returns `None` if there is no Python.
    pub fn python_pager(snapshot: &Path, socket: &Path) -> Option<Self> {
        // Another one may be a wrapper, which takes the lab long.
        let debians = Path::new("/usr/bin/python3");
        let python = if debians.is_file() { debians.to_owned() } else { program("python3")? };
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/demand-pager/examples/pager.py");
        let memory = snapshot.join("memory");
        Some(Self::serving(&[&python, &script, &memory, socket, Path::new("--staging")]))
    }

    /// Returns the example of a Firecracker handler, which has a snapshot's memory.
    ///
    /// # Errors
    ///
    /// If it has not been built.
    pub fn firecracker_handler(snapshot: &Path, socket: &Path) -> Result<Self> {
        let handler = example("firecracker-handler")?;
        Ok(Self::serving(&[&handler, &snapshot.join("memory"), socket]))
    }

    /// Returns an nbdkit whose exports are the files of a snapshot. Returns `None` if it is not
    /// installed.
    pub fn nbdkit(snapshot: &Path, socket: &Path) -> Option<Self> {
        let program = program("nbdkit")?;
        let (folder, socket) = (format!("dir={}", snapshot.display()), socket.to_owned());
        Some(Self::new(move || {
            // A killed nbdkit leaves it, and another one does not listen on it.
            let _ = std::fs::remove_file(&socket);
            let mut command = Command::new(&program);
            command.args(["--foreground", "--readonly", "--threads", "64", "--unix"]);
            command.arg(&socket).args(["file", &folder]);
            command
        }))
    }

    fn serving(words: &[&Path]) -> Self {
        let words: Vec<_> = words.iter().map(|word| word.to_path_buf()).collect();
        Self::new(move || {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            command
        })
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        match self {
            PageServer::Web(web) => web.stop(),
            PageServer::Program(program) => program.process = None,
        }
    }

    /// Starts the server, again in the same place, and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    ///
    /// # Panics
    ///
    /// If it does not listen in time.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        match self {
            PageServer::Web(web) => web.restart(""),
            PageServer::Program(program) => {
                let mut command = (program.command)();
                let process = Guarded::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
                until("the server listens", || listens(process.id()));
                program.process = Some(process);
            }
        }
        Ok(())
    }
}
