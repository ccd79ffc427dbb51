// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The example handler, as a process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use demand_pager::firecracker::FirecrackerSource;
use demand_pager::{PagerError, PagerOptions};
use tempfile::TempDir;
use test_support::wait::{listens, until};

/// The behaviour of a handler.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    /// Copies the page that is touched.
    Page,
    /// Copies all pages at the first fault.
    Everything,
    /// Kills its peer after some faults, and ends.
    GivesUp,
    /// Receives the memory, and does nothing.
    Never,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Page => "page",
            Way::Everything => "everything",
            Way::GivesUp => "gives-up",
            Way::Never => "never",
        }
    }
}

/// A handler's process, which ends with this value.
pub(crate) struct Handler {
    child: Child,
    way: Way,
    folder: TempDir,
}

impl Handler {
    pub(crate) fn start(content: &[u8], way: Way) -> Handler {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("memory"), content).unwrap();
        Handler { child: spawn(folder.path(), way), way, folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn open(&self) -> Result<FirecrackerSource, PagerError> {
        let size = fs::metadata(self.folder.path().join("memory")).unwrap().len();
        FirecrackerSource::open(self.socket(), size, PagerOptions::default())
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.wait();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) {
        self.child.wait().unwrap();
    }

    pub(crate) fn restart(&mut self) {
        self.restart_as(self.way);
    }

    pub(crate) fn restart_as(&mut self, way: Way) {
        self.child = spawn(self.folder.path(), way);
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &Path, way: Way) -> Child {
    let program = std::env::current_exe().unwrap();
    let program = program.parent().unwrap().with_file_name("examples").join("firecracker-handler");
    let hint = "build the examples first: cargo build -p demand-pager --examples --all-features";
    assert!(program.exists(), "{hint}");
    let mut command = Command::new(program);
    command.arg(folder.join("memory")).arg(folder.join("socket")).arg(way.name());
    let child = command.stdin(Stdio::null()).spawn().unwrap();
    until("the handler listens", || listens(child.id()));
    child
}
