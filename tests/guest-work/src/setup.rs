// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes the guest fit for work: mounts, the console, modules, the disk.

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

/// Where the initramfs has modules, and the list of them in the order in which they are loaded.
const MODULES: &str = "/modules";
/// By what the kernel tells the time.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// How long a device may take to appear; a guest in an emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Everything that needs no disk.
pub fn machine() -> Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(place)?;
        match mount(kind, place, kind, MountFlags::empty(), None) {
            // The kernel mounts /dev by itself if it is built so.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("{kind} could not be mounted"));
            }
        }
    }
    console::open()?;
    // From here on the kernel's messages come out as lines of this program's, which are whole; only
    // emergencies still go to the console directly.
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

/// What to say once the guest is up.
pub fn ready() -> Line {
    Line::Ready {
        cpus: thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64),
        kernel: uname().release().to_string_lossy().into_owned(),
        clock: fs::read_to_string(CLOCK).map_or("none".into(), |clock| clock.trim().into()),
    }
}

/// Sets the time of day to what the command line says (`epoch=SECONDS`): a kernel without kvm-clock
/// finds none.
fn set_time() -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let Some(epoch) = line.split_whitespace().find_map(|word| word.strip_prefix("epoch=")) else {
        return Ok(());
    };
    let time = Timespec { tv_sec: epoch.parse().context("epoch=")?, tv_nsec: 0 };
    clock_settime(ClockId::Realtime, time).context("the time of day could not be set")
}

/// Waits for a device, which appears a moment after its driver.
pub fn await_path(path: &Path) -> Result<()> {
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
