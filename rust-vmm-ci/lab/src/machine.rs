// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated machine: starts QEMU with the right command line.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

use crate::protocol::{CONTROL_PORT, OUT_TAG, ROOT_TAG, STDERR_PORT, STDOUT_PORT};
use crate::tsc;

const QEMU: &str = "qemu-system-x86_64";

/// The CPU model, without XSAVE: QEMU reports inconsistent sizes of its state to nested guests,
/// which warn. Features that need XSAVE are off, too: a kernel of version 7.x that finds AVX
/// without XSAVE uses it, and oopses.
const CPU: &str = "max,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-pku,-mpx";

/// The configuration of the machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Number of emulated CPUs.
    ///
    /// Nested guests that receive interrupts are safe with one CPU only, because of a bug in QEMU
    /// (from 7.2 to the newest version examined). When QEMU injects an interrupt at `vmrun`, it
    /// delivers the interrupt but leaves it in `exception_index`. If another event makes its CPU
    /// loop exit before the guest's next exit, without an interrupt for this CPU, the loop mistakes
    /// the leftover for an exception and delivers it. The guest then receives the interrupt a
    /// second time, with interrupts disabled, and deadlocks on a lock that it holds. The event is
    /// another CPU's turn, or another CPU's interrupt. A Linux guest hung in this way in 1 of 6
    /// boots with two CPUs, and in none of 75 with one.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Huge pages of 2M reserved at boot.
    pub hugepages: u64,
    /// Huge pages of 1G reserved at boot.
    pub gigapages: u64,
    /// Whether the clock counts instructions.
    pub icount: bool,
    /// Whether the machine has a network card, through which it reaches the host's loopback.
    pub network: bool,
    /// Additional kernel parameters.
    pub append: String,
    /// Socket path of QEMU's monitor, if wanted.
    pub monitor: Option<PathBuf>,
}

/// The machine's ends of the streams between it and the session.
#[derive(Debug)]
pub(crate) struct Ends {
    /// The kernel's console.
    pub console: OwnedFd,
    /// Messages to and from the agent.
    pub control: OwnedFd,
    /// The command's standard output.
    pub stdout: OwnedFd,
    /// The command's standard error.
    pub stderr: OwnedFd,
}

impl Machine {
    /// Memory that the kernel and the command need in addition to reserved huge pages, in MiB.
    pub(crate) const LEAST_MEMORY_MIB: u64 = 512;

    /// Starts QEMU, which is killed when the calling thread ends.
    pub(crate) fn start(
        &self,
        kernel: &Path,
        initramfs: File,
        out: &Path,
        ends: Ends,
    ) -> Result<Child> {
        let mut qemu = self.command(kernel, &initramfs, out, &ends)?;
        let parent = getpid();
        // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
        unsafe {
            qemu.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have died before the call above.
                if getppid() != Some(parent) {
                    return Err(rustix::io::Errno::SRCH.into());
                }
                Ok(())
            });
        }
        qemu.spawn()
            .with_context(|| format!("{QEMU} could not be started (rust-vmm-ci/setup installs it)"))
    }

    fn command(&self, kernel: &Path, initramfs: &File, out: &Path, ends: &Ends) -> Result<Command> {
        let mut qemu = Command::new(QEMU);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-cpu", CPU])
            // Little memory below 4G, where the firmware and the kernel fragment it, so that most
            // memory is available for 1G huge pages.
            .args(["-machine", "pc,max-ram-below-4g=1G"])
            // With one host thread per CPU, nested guests hang more often.
            .args(["-accel", "tcg,thread=single"])
            // The kernel finds its CPUs through the MP tables, which list sockets.
            .args(["-smp", &format!("cpus={0},sockets={0}", self.cpus)])
            .args(["-m", &format!("{}M", self.memory_mib)])
            .arg("-kernel")
            .arg(kernel)
            .args(["-initrd", &format!("/dev/fd/{}", initramfs.as_raw_fd())])
            .args(["-append", &self.parameters()])
            .args(["-device", "virtio-serial-pci"]);
        if self.icount {
            qemu.args(["-icount", "shift=0"]);
        }
        if self.network {
            // QEMU's own address translation: it needs no privileges.
            qemu.args([
                "-netdev",
                "user,id=host",
                "-device",
                "virtio-net-pci,netdev=host,romfile=",
            ]);
        }
        if let Some(monitor) = &self.monitor {
            let monitor = value(monitor)?;
            qemu.args(["-monitor", &format!("unix:{monitor},server=on,wait=off")]);
        }
        let ports = [
            ("console", &ends.console),
            (CONTROL_PORT, &ends.control),
            (STDOUT_PORT, &ends.stdout),
            (STDERR_PORT, &ends.stderr),
        ];
        for (name, end) in ports {
            fcntl_setfd(end, FdFlags::empty())?;
            qemu.arg("-chardev").arg(format!("socket,id={name},fd={}", end.as_raw_fd()));
            if name == "console" {
                qemu.args(["-serial", "chardev:console"]);
            } else {
                qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
            }
        }
        let shares = [(ROOT_TAG, Path::new("/"), ",readonly=on"), (OUT_TAG, out, "")];
        for (tag, path, mode) in shares {
            let path = value(path)?;
            qemu.arg("-fsdev")
                .arg(format!(
                    "local,id={tag},path={path},security_model=none,multidevs=remap{mode}"
                ))
                .arg("-device")
                .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Ok(qemu)
    }

    fn parameters(&self) -> String {
        let mut parameters = String::from("console=ttyS0 quiet panic=-1");
        // Without ACPI the boot is faster, and the MP tables contain the same information. The
        // watchdog is off because it would mistake a stalled host for a hung lab.
        parameters += " acpi=off nowatchdog";
        // QEMU's timers need no test, and its TSCs are synchronised, although the kernel would not
        // assume that with several sockets.
        parameters += " lapic_timer_khz=1000000 no_timer_check tsc=reliable";
        let tsc = if self.icount { 1_000_000 } else { tsc::khz() };
        parameters += &format!(" tsc_early_khz={tsc}");
        if self.gigapages > 0 {
            parameters += &format!(" hugepagesz=1G hugepages={}", self.gigapages);
        }
        if self.hugepages > 0 {
            parameters += &format!(" hugepagesz=2M hugepages={}", self.hugepages);
        }
        if !self.append.is_empty() {
            parameters += " ";
            parameters += &self.append;
        }
        parameters
    }
}

/// Returns a path as a value in a QEMU option, where a comma is doubled.
fn value(path: &Path) -> Result<String> {
    let path = path
        .to_str()
        .with_context(|| format!("{} is no UTF-8: choose another path", path.display()))?;
    Ok(path.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_name_the_requested_pools() {
        let mut machine = Machine {
            cpus: 2,
            memory_mib: 4096,
            hugepages: 600,
            gigapages: 0,
            icount: false,
            network: false,
            append: "kvm_amd.npt=0".into(),
            monitor: None,
        };
        let parameters = machine.parameters();
        assert!(parameters.contains("hugepagesz=2M hugepages=600"));
        assert!(!parameters.contains("1G"));
        assert!(parameters.ends_with(" kvm_amd.npt=0"));
        machine.gigapages = 1;
        assert!(machine.parameters().contains("hugepagesz=1G hugepages=1 "));
    }
}
