// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Back-end processes: the project's own, qemu-storage-daemon, and DPDK's testpmd.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use test_support::wait::listens;

use crate::process::{Guarded, program};

/// A back-end that serves one device on a socket.
#[derive(Debug)]
pub struct BackEnd {
    process: Guarded,
    socket: PathBuf,
    /// The file with its output, if kept.
    log: Option<PathBuf>,
}

/// Options for starting the project's own back-end.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// Number of queues.
    pub queues: u16,
    /// Maximum number of entries in each queue.
    pub queue_size: u16,
    /// Whether it offers PAGEFAULT.
    pub postcopy: bool,
}

impl BackEnd {
    /// Starts vhost-device-blk on `disk`.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or does not listen in time.
    pub fn vhost_device_blk(folder: &Path, disk: &Path, options: &BlkOptions) -> Result<Self> {
        Self::vhost_device_blk_at(folder.join("blk.sock"), disk, options)
    }

    /// Starts vhost-device-blk on `disk`, listening at `socket`.
    ///
    /// # Errors
    ///
    /// As for [`vhost_device_blk`](Self::vhost_device_blk).
    pub fn vhost_device_blk_at(socket: PathBuf, disk: &Path, options: &BlkOptions) -> Result<Self> {
        let mut command = Command::new(program("vhost-device-blk")?);
        command
            .arg("--socket-path")
            .arg(&socket)
            .arg("--blk-file")
            .arg(disk)
            .arg("--num-queues")
            .arg(options.queues.to_string())
            .arg("--queue-size")
            .arg(options.queue_size.to_string())
            .arg("--postcopy")
            .arg(if options.postcopy { "on" } else { "off" });
        BackEnd::start(command, socket)
    }

    /// Starts qemu-storage-daemon, which offers PAGEFAULT but replies with our own addresses.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or does not listen in time.
    pub fn qemu_storage_daemon(folder: &Path, disk: &Path) -> Result<Self> {
        Self::qemu_storage_daemon_with(folder, disk, 1)
    }

    /// Like [`qemu_storage_daemon`](Self::qemu_storage_daemon), with `queues` queues.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn qemu_storage_daemon_with(folder: &Path, disk: &Path, queues: u16) -> Result<Self> {
        let socket = folder.join("qsd.sock");
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f,filename={},locking=off", disk.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,\
                 num-queues={queues}",
                socket.display()
            ));
        BackEnd::start(command, socket)
    }

    /// Starts DPDK's testpmd as a network card's back-end, listening at `socket`: it answers the
    /// guest's ARP requests for any address, and returns echoes. With `locked`, it locks all its
    /// memory, so that the kernel touches every mapping at once. Its output goes to a file beside
    /// the socket.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or does not listen in time.
    pub fn testpmd(socket: PathBuf, postcopy: bool, locked: bool) -> Result<Self> {
        let log = socket.with_extension("log");
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        // It polls, on a CPU that it shares: other threads have priority.
        let mut command = Command::new("nice");
        command
            .args(["-n", "10", "dpdk-testpmd"])
            // No huge pages and no shared configuration for itself, and no cards of the host.
            .args(["--no-huge", "-m", "64", "--no-shconf", "--no-telemetry", "--no-pci"])
            // A control thread and a polling thread, both on CPU 0.
            .args(["--lcores", "0@0,1@0"])
            .arg("--vdev")
            .arg(format!(
                "net_vhost0,iface={},queues=1,postcopy-support={}",
                socket.display(),
                u8::from(postcopy)
            ))
            .args(["--", if locked { "--mlockall" } else { "--no-mlockall" }])
            // With a period it does not wait for input.
            .arg("--stats-period=3600")
            .args(["--forward-mode=icmpecho", "--auto-start", "--total-num-mbufs=2048"])
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut this = BackEnd::start(command, socket)
            .context("start dpdk-testpmd, which rust-vmm-ci/setup --tests installs")?;
        this.log = Some(log);
        Ok(this)
    }

    fn start(mut command: Command, socket: PathBuf) -> Result<Self> {
        let process = Guarded::spawn(command.stdin(Stdio::null()))?;
        let mut this = BackEnd { process, socket, log: None };
        let begun = Instant::now();
        while !listens(this.process.id()) {
            if let Some(status) = this.process.try_wait()? {
                bail!("the back-end ended before it listened: {status}");
            }
            // Two testpmds that poll take most of an emulated processor.
            if begun.elapsed() > Duration::from_secs(180) {
                bail!("the back-end does not listen on {}", this.socket.display());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(this)
    }

    /// Returns the path on which it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns its output, if kept.
    pub fn said(&self) -> Option<String> {
        let said = std::fs::read(self.log.as_ref()?).unwrap_or_default();
        Some(String::from_utf8_lossy(&said).into_owned())
    }

    /// Returns the back-end's process.
    pub fn process(&mut self) -> &mut Guarded {
        &mut self.process
    }

    /// Ends it with SIGTERM, as an administrator would, and waits for its end.
    ///
    /// # Errors
    ///
    /// If it does not end, or not with success.
    pub fn terminate(mut self) -> Result<()> {
        let id = libc::pid_t::try_from(self.process.id())?;
        // SAFETY: the child has not been reaped, so its ID has not been reused.
        unsafe { libc::kill(id, libc::SIGTERM) };
        let status = self.process.wait(Duration::from_secs(60)).context("end the back-end")?;
        anyhow::ensure!(status.success(), "the back-end ended with {status}");
        Ok(())
    }

    /// Returns whether a process still accepts connections on the socket.
    pub fn accepts(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }
}
