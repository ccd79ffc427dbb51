// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes with a restricted set of devices.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use test_support::program::copy_for_everybody;

use crate::process::program;

/// A device in a sandbox's `/dev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    path: &'static CStr,
    number: libc::dev_t,
    mode: libc::mode_t,
}

impl Device {
    /// Returns the machine's device at this path, with other permissions; `None` if it does not
    /// exist.
    pub fn of_machine(path: &'static CStr, mode: u32) -> Option<Self> {
        let metadata = fs::metadata(path.to_str().ok()?).ok()?;
        Some(Device { path, number: metadata.rdev(), mode })
    }
}

/// Returns whether this process may create sandboxes.
pub fn is_root() -> bool {
    // SAFETY: the call has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Copies the program `name` of this workspace into a folder where any user can run it, and makes
/// the folder readable for any user.
///
/// # Errors
///
/// If it has not been built, and the system's.
pub fn for_everybody(name: &str, folder: &Path) -> anyhow::Result<PathBuf> {
    Ok(copy_for_everybody(&program(name)?, folder)?)
}

/// Limits the process's use of a resource (`RLIMIT_NOFILE` and others), permanently.
pub fn with_limit(command: &mut Command, resource: libc::__rlimit_resource_t, most: u64) {
    let set_up = move || {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the call reads the structure, and changes only the child.
        check(unsafe { libc::setrlimit(resource, &limit) })
    };
    // SAFETY: between fork and exec the closure makes one system call; it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(set_up) };
}

/// Gives the process a separate `/dev` that has only these devices, and runs it as `user` if given.
/// Needs root.
pub fn with_devices(command: &mut Command, devices: Vec<Device>, user: Option<u32>) {
    let set_up = move || {
        // The process gets a separate mount namespace before anything is mounted.
        // SAFETY: unshare changes only the child, which has one thread.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        // (Within a chroot, "/" may not be a mount; only the mounts on /dev matter.)
        mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)
            .or_else(|_| mount(c"none", c"/dev", None, libc::MS_REC | libc::MS_PRIVATE))?;
        mount(c"none", c"/dev", Some(c"tmpfs"), 0)?;
        for device in &devices {
            // SAFETY: the path is a C string.
            check(unsafe {
                libc::mknod(device.path.as_ptr(), libc::S_IFCHR | 0o600, device.number)
            })?;
            // SAFETY: as above. (mknod's mode is subject to the umask.)
            check(unsafe { libc::chmod(device.path.as_ptr(), device.mode) })?;
        }
        if let Some(user) = user {
            // SAFETY: these calls change only the child's identity; groups come first, while it has
            // the right.
            check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
            // SAFETY: as above.
            check(unsafe { libc::setgid(user) })?;
            // SAFETY: as above.
            check(unsafe { libc::setuid(user) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes only system calls; it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(set_up) };
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all strings are C strings or null, and the data pointer is null.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, std::ptr::null()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
