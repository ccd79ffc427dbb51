// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disk's back-end, as a process.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// A back-end started by an example; killed when dropped.
#[derive(Debug)]
pub struct Device(Child);

impl Device {
    /// Starts the `vhost-device-blk` in this program's folder on a new disk of 4 MiB, and waits
    /// until it listens.
    ///
    /// # Errors
    ///
    /// Fails if the disk cannot be created, or the back-end does not listen within 30 s.
    pub fn start(disk: &Path, socket: &Path) -> Result<Self> {
        File::create(disk)?.set_len(4 << 20)?;
        let program = std::env::current_exe()?.with_file_name("vhost-device-blk");
        let mut command = Command::new(&program);
        command.arg("--socket-path").arg(socket).arg("--blk-file").arg(disk);
        let child = command.args(["--postcopy", "require"]).stdin(Stdio::null()).spawn();
        let mut this = Device(child.map_err(|error| {
            format!(
                "cannot start {}: {error}; build it: cargo build -p vhost-device-blk",
                program.display()
            )
        })?);
        let begun = Instant::now();
        while !socket.exists() {
            if let Some(status) = this.0.try_wait()? {
                return Err(format!("cannot start the back-end: it ended with {status}").into());
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err("cannot start the back-end: it does not listen after 30 s".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(this)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Both fail only if it has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
