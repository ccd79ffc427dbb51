// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A full disk: the restore continues, and the log says so once.

use std::process::Command;
use std::sync::Mutex;

use demand_remote::HostCache;
use test_support::host::skip;

use crate::shared::{ROOMY, distinct, open, push};
use crate::support::{Place, check_content};

/// Set in the process that has a small file system of its own.
const CHILD: &str = "CACHE_TEST_FULL_DISK";

/// The lines of the log.
struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("demand_remote") {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

static LINES: Lines = Lines(Mutex::new(Vec::new()));

fn read_on_full_disk(folder: &str) {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let place = Place::new();
    // 4 MiB, for a disk of 2 MiB.
    let content = distinct(256, 60);
    push(&place, "vm", &content);
    let cache = HostCache::open(folder, ROOMY).unwrap();
    for _ in 0..3 {
        check_content(&open(&place, "vm", &cache), &content);
    }
    let stats = cache.stats();
    println!("{stats:?}");
    let lines = LINES.0.lock().unwrap();
    println!("{lines:?}");
    assert_eq!(lines.len(), 1);
    assert!(lines[0].starts_with(&format!("cannot write to the host cache {folder}: ")));
    // The chunks that were written before are still read.
    assert!(stats.written_bytes > 1 << 20 && stats.hit_bytes >= stats.written_bytes / 2);
}

#[test]
fn full_disk_is_said_once() {
    if let Some(folder) = std::env::var_os(CHILD) {
        return read_on_full_disk(folder.to_str().unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=2m,mode=700 none \"$1\" || exit 77; shift; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(folder.path());
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "full_disk::full_disk_is_said_once", "--nocapture"]);
    let Ok(output) = command.env(CHILD, folder.path()).output() else {
        return skip("there is no program unshare");
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || errors.contains("unshare failed") {
        return skip("this user cannot mount a file system");
    }
    println!("{said}");
    assert!(output.status.success(), "{said}{errors}");
}
