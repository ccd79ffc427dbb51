// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets up the guest: mounts, the console, modules, the disk.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_work::Line;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{finit_module, uname};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::console;

/// The folder of modules in the initramfs, and of their list in load order.
const MODULES: &str = "/modules";
/// The kernel's file for its clock source.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Time limit for a device to appear; a guest in an emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sets up everything that needs no disk.
pub(crate) fn machine() -> Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(place)?;
        match mount(kind, place, kind, MountFlags::empty(), None) {
            // A kernel may be configured to mount /dev by itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("{kind} could not be mounted"));
            }
        }
    }
    console::open()?;
    // From here on the kernel's messages are printed as complete lines of this program; only
    // emergencies still go directly to the console.
    fs::write("/proc/sys/kernel/printk", "1").context("the log level could not be set")?;
    set_time()?;
    load_modules()
}

fn load_modules() -> Result<()> {
    let list = Path::new(MODULES).join("order");
    if !list.exists() {
        return Ok(());
    }
    for name in fs::read_to_string(&list)?.lines() {
        let path = Path::new(MODULES).join(name);
        let file = File::open(&path)
            .with_context(|| format!("the module {} could not be opened", path.display()))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                bail!("the module {name} could not be loaded: {error} (see the kernel's log)")
            }
        }
    }
    Ok(())
}

/// Returns the line to print once the guest is up.
pub(crate) fn ready() -> Line {
    Line::Ready {
        cpus: thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64),
        kernel: uname().release().to_string_lossy().into_owned(),
        clock: fs::read_to_string(CLOCK).map_or("none".into(), |clock| clock.trim().into()),
    }
}

/// Sets the time of day from the command line (`epoch=SECONDS`): a kernel without kvm-clock finds
/// none.
fn set_time() -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let Some(epoch) = line.split_whitespace().find_map(|word| word.strip_prefix("epoch=")) else {
        return Ok(());
    };
    let time = Timespec { tv_sec: epoch.parse().context("epoch=")?, tv_nsec: 0 };
    clock_settime(ClockId::Realtime, time).context("the time of day could not be set")
}

/// Waits for a device, which appears a moment after its driver is loaded.
pub(crate) fn await_path(path: &Path) -> Result<()> {
    let begun = Instant::now();
    while !path.exists() {
        if begun.elapsed() > PATIENCE {
            bail!(
                "{} did not appear within {PATIENCE:?}: is it declared, is its driver there?",
                path.display()
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
