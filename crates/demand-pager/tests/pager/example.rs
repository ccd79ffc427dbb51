// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The example pagers, as processes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use demand_pager::{Location, PagerOptions, PagerSource};
use tempfile::TempDir;
use test_support::wait::until;

/// A running pager, which ends with this value.
pub(crate) struct Example {
    child: Child,
    command: Vec<String>,
    folder: TempDir,
}

/// Runs a test with each example, answering inline and by a staging area. One that cannot run here
/// is skipped.
pub(crate) fn each(path: &Path, test: impl Fn(Example)) {
    let folder = std::env::current_exe().unwrap();
    let in_rust = folder.parent().unwrap().with_file_name("examples").join("pager");
    assert!(in_rust.exists(), "build the examples first: cargo build -p demand-pager --examples");
    let in_python = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pager.py");
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let mut commands = vec![vec![text(in_rust)]];
    match Command::new("python3").arg("--version").stdout(Stdio::null()).status() {
        Ok(status) if status.success() => commands.push(vec!["python3".into(), text(in_python)]),
        _ => println!("SKIPPED: python3 is not installed"),
    }
    for command in commands {
        for staging in [&[][..], &["--staging".into()]] {
            println!("{command:?} {staging:?}");
            let path = [text(path.to_owned()), "SOCKET".into()];
            test(Example::start([&command[..], &path, staging].concat()));
        }
    }
}

impl Example {
    fn start(mut command: Vec<String>) -> Example {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket").to_str().unwrap().to_owned();
        for word in command.iter_mut().filter(|word| *word == "SOCKET") {
            word.clone_from(&socket);
        }
        let example = Example { child: spawn(&command), command, folder };
        example.wait();
        example
    }

    fn wait(&self) {
        until("the pager listens", || test_support::wait::listens(self.child.id()));
    }

    /// Returns the location of an image.
    pub(crate) fn location(&self, parameters: &str) -> Location {
        let socket = self.folder.path().join("socket");
        format!("pager:{}{parameters}", socket.display()).parse().unwrap()
    }

    /// Opens an image.
    pub(crate) fn open(&self, parameters: &str) -> PagerSource {
        PagerSource::open(&self.location(parameters), PagerOptions::default()).unwrap()
    }

    /// Kills the pager.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the killed pager again.
    pub(crate) fn restart(&mut self) {
        self.child = spawn(&self.command);
        self.wait();
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &[String]) -> Child {
    let mut started = Command::new(&command[0]);
    started.args(&command[1..]).stdin(Stdio::null()).stderr(Stdio::null());
    started.spawn().unwrap()
}
