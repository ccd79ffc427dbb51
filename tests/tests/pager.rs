// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests restored from the example pagers, which are killed and started again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use demand_source::{Destination, HashedImage, ImageWriter, PageSource};
use demand_tests::cannot_run;
use demand_tests::host::skip;
use demand_tests::process::{Guarded, example};
use demand_tests::refusal::{FAILED, refused};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::{Go, SnapshotRequest, State};
use test_support::wait::{listens, until};

/// Image offset of the first byte that no guest of these tests uses.
const UNUSED: u64 = 32 << 20;
/// Bytes of content there.
const CONTENT: usize = 24 << 20;

/// An example pager, which ends with this value.
struct Pager {
    command: Vec<String>,
    child: Child,
}

impl Pager {
    fn start(command: Vec<String>) -> Pager {
        let mut program = Command::new(&command[0]);
        let child = program.args(&command[1..]).stdin(Stdio::null()).spawn().unwrap();
        let pager = Pager { command, child };
        until("the pager listens", || listens(pager.child.id()));
        pager
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        *self = Pager::start(self.command.clone());
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the command of the pager in Python, if it can run here.
fn python() -> Option<Vec<String>> {
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/demand-pager/examples/pager.py");
    match Command::new("python3").arg("--version").stdout(Stdio::null()).status() {
        Ok(status) if status.success() => {
            Some(vec!["python3".into(), script.to_str().unwrap().into()])
        }
        _ => {
            skip("python3 is not installed");
            None
        }
    }
}

/// Adds content to pages of the snapshot that its guest does not use.
fn enlarge(snapshot: &Path) -> Vec<u8> {
    let mut content = vec![0; CONTENT];
    for (word, bytes) in content.chunks_mut(8).enumerate() {
        let word = (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let [memory, hashes, new_memory, new_hashes] =
        ["memory", "hashes", "new-memory", "new-hashes"].map(|name| snapshot.join(name));
    let old = HashedImage::open(&memory, &hashes).unwrap();
    let mut used = vec![0; usize::try_from(UNUSED).unwrap()];
    old.read_through(0, &mut Destination::from(&mut used[..])).unwrap();
    let new = ImageWriter::create(&new_memory, &new_hashes, old.size(), old.generation());
    let mut new = new.unwrap();
    new.write(0, &used).unwrap();
    new.write(UNUSED, &content).unwrap();
    new.finish().unwrap();
    fs::rename(new_memory, memory).unwrap();
    fs::rename(new_hashes, hashes).unwrap();
    content
}

/// Starts a guest; returns its process, and its lines of standard error.
fn start(command: &mut Command) -> (Guarded, Receiver<String>) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut vmm = Guarded::spawn(command).unwrap();
    let (sender, lines) = channel();
    let pipe = BufReader::new(vmm.child().stderr.take().unwrap());
    thread::spawn(move || {
        pipe.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    (vmm, lines)
}

fn wait_said(lines: &Receiver<String>, words: &[&str]) -> String {
    loop {
        let line = lines.recv_timeout(Duration::from_secs(60));
        let line = line.unwrap_or_else(|_| panic!("no line has {words:?}"));
        if words.iter().all(|word| line.contains(word)) {
            return line;
        }
    }
}

/// Restores a guest with a slow fill, kills the pager while pages are missing, starts it again, and
/// compares the memory once all of it is present.
fn outlasts(snapshot: &TinySnapshot, content: &[u8], source: &str, command: Vec<String>) {
    let mut pager = Pager::start(command);
    let mut restore = snapshot.restore_from(source, &[]).unwrap();
    let (mut vmm, lines) = start(restore.args(["--serial", "off", "--fill", "rate=8M"]));
    snapshot.wait_running();

    pager.kill();
    let line = wait_said(&lines, &["cannot use pager", "connecting again; "]);
    println!("{line}");
    thread::sleep(Duration::from_secs(1));
    let status = snapshot.api().status().unwrap();
    assert_eq!(status.state, State::Running);
    assert!(status.pages_present < status.pages_total, "{status:?}");
    pager.restart();
    until("all pages are present", || {
        let status = snapshot.api().status().unwrap();
        status.pages_present == status.pages_total
    });

    let copy = snapshot.at("copy");
    let request = SnapshotRequest { destination: copy.clone(), then: Some(Go::Shutdown) };
    snapshot.api().snapshot(&request, |_| {}).unwrap();
    assert!(vmm.wait(Duration::from_secs(60)).unwrap().success());
    let image = HashedImage::open(copy.join("memory"), copy.join("hashes")).unwrap();
    let mut arrived = vec![0; CONTENT];
    image.read_through(UNUSED, &mut Destination::from(&mut arrived[..])).unwrap();
    assert!(arrived == content, "the memory is that of the snapshot");
    fs::remove_dir_all(copy).unwrap();
}

#[test]
fn guest_outlasts_killed_pagers() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let content = enlarge(&snapshot.dir());
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (dir, socket) = (text(snapshot.dir()), text(snapshot.at("pager.sock")));
    let memory = text(snapshot.dir().join("memory"));
    let rust = text(example("pager").unwrap());
    // It has all files.
    let source = format!("pager:{socket}");
    outlasts(&snapshot, &content, &source, vec![rust, dir.clone(), socket.clone()]);
    // The others have the memory.
    let with_files = |scheme| format!("{scheme}:{socket}?files={dir}");
    if let Some(python) = python() {
        let command = [python, vec![memory.clone(), socket.clone(), "--staging".into()]].concat();
        outlasts(&snapshot, &content, &with_files("pager"), command);
    }
    let handler = text(example("firecracker-handler").unwrap());
    let command = vec![handler, memory, socket.clone()];
    outlasts(&snapshot, &content, &with_files("pager+firecracker"), command);
}

/// The pager's page differs from its hash.
#[test]
fn wrong_pages_reach_no_guest() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let page = snapshot.flip().unwrap();
    let socket = snapshot.at("pager.sock");
    let command = [example("pager").unwrap(), snapshot.dir(), socket.clone()];
    let pager = Pager::start(command.map(|path| path.to_str().unwrap().to_owned()).into());
    let source = format!("pager:{}", socket.display());
    let mut restore = snapshot.restore_from(&source, &[]).unwrap();
    // A pager on a busy machine may be silent for seconds.
    restore.args(["--lazy", "off", "--source-limit", "8", "--serial", "off", "--log-level", "off"]);
    let words = [&*format!("offset {page} of {source}"), "page hashes", "--source-limit"];
    refused(&mut restore, FAILED, &words);

    // A pager that is away is refused at once.
    drop(pager);
    let mut restore = snapshot.restore_from(&source, &[]).unwrap();
    refused(&mut restore, FAILED, &["state: cannot use pager:", "the pager cannot be reached"]);
}
