// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens userfaultfds, negotiates their features, and checks those that other processes have sent.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use linux_raw_sys::{general as raw, ioctl as request};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use crate::{Features, OpenError};

ioctl_io_nr!(USERFAULTFD_IOC_NEW, raw::USERFAULTFD_IOC, 0);

/// The flag of the system call for a userfaultfd that traps no access of the kernel.
const USER_MODE_ONLY: libc::c_int = raw::UFFD_USER_MODE_ONLY as libc::c_int;

/// The lowest number of a userfaultfd's descriptor: higher than a VMM's number of descriptors, and
/// normally below the limit of open files.
const HIGH: libc::c_int = 512;

/// The way in which this process opens a userfaultfd, in the order in which the ways are tried.
/// Source: Documentation/admin-guide/mm/userfaultfd.rst, "Creating a userfaultfd".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// `/dev/userfaultfd` (Linux 6.1), whose file permissions control access.
    Device,
    /// The system call, which needs `CAP_SYS_PTRACE`, or 1 as the value of the sysctl
    /// `vm.unprivileged_userfaultfd`.
    SystemCall,
    /// The system call with `UFFD_USER_MODE_ONLY` (Linux 5.11), which needs no permission and traps
    /// no access of the kernel. Only [`open_user_mode`](crate::Userfaultfd::open_user_mode) uses it.
    UserMode,
}

/// The accesses that a userfaultfd traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accesses {
    /// Those of user-mode code and of the kernel.
    All,
    /// Those of user-mode code.
    UserMode,
}

/// Opens a userfaultfd of this process with the given features, as
/// [`Userfaultfd::open`](crate::Userfaultfd::open) describes.
pub(crate) fn open(features: Features, accesses: Accesses) -> Result<(OwnedFd, Access), OpenError> {
    let (fd, access) = open_fd(accesses)?;
    if handshake(&fd, features).is_ok() {
        return Ok((closed_early(fd), access));
    }
    // A refused handshake does not name the cause: query the kernel's features, and compare.
    let (known, _) = kernel_features(accesses)?;
    Err(OpenError::Features { wanted: features, lacking: features.without(known) })
}

/// Returns the features that the kernel has, and the way in which this process could query them.
pub(crate) fn kernel_features(accesses: Accesses) -> Result<(Features, Access), OpenError> {
    let (fd, access) = open_fd(accesses)?;
    let features = handshake(&fd, Features::NONE).map_err(OpenError::Failed)?;
    Ok((features, access))
}

/// Checks that a descriptor that another process has sent is a userfaultfd and ready for use, and
/// makes it non-blocking.
pub(crate) fn check_received(fd: &OwnedFd) -> Result<(), OpenError> {
    let refuse = |found: String| Err(OpenError::NoUserfaultfd { found });
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) if name.as_os_str() == "anon_inode:[userfaultfd]" => {}
        Ok(name) => return refuse(name.display().to_string()),
        // Without /proc the request below decides, but only among files without a file type. A
        // device can answer a request in any way, and its reads can return anything that the sender
        // likes.
        Err(_) if is_anonymous(fd).map_err(OpenError::Unusable)? => {}
        Err(_) => return refuse("a file or a device".into()),
    }
    // SAFETY: fcntl with these commands touches no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above. A blocking userfaultfd cannot be polled.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(OpenError::Unusable(io::Error::last_os_error()));
    }
    let nothing = raw::uffdio_range { start: 0, len: 0 };
    // SAFETY: the request reads a range of this type; an empty one does nothing.
    unsafe { ioctl_with_ref(fd, request::UFFDIO_WAKE.into(), &nothing) };
    let answer = io::Error::last_os_error();
    if answer.raw_os_error() != Some(libc::EINVAL) {
        return refuse(format!("a file that answers '{answer}'"));
    }
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, as the count says.
    if unsafe { libc::poll(&mut poll, 1, 0) } < 0 || poll.revents & libc::POLLERR != 0 {
        return Err(OpenError::NotInitialised);
    }
    Ok(())
}

/// Returns whether a descriptor refers to an anonymous file of the kernel, as that of a userfaultfd
/// does: only such files have no file type.
fn is_anonymous(fd: &OwnedFd) -> io::Result<bool> {
    Ok(File::from(fd.try_clone()?).metadata()?.mode() & libc::S_IFMT == 0)
}

/// Opens a descriptor of a userfaultfd that is not ready for use yet.
fn open_fd(accesses: Accesses) -> Result<(OwnedFd, Access), OpenError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if accesses == Accesses::UserMode {
        return system_call(flags | USER_MODE_ONLY).map(|fd| (fd, Access::UserMode)).map_err(
            |error| match error.raw_os_error() {
                Some(libc::ENOSYS) => OpenError::NoKernelSupport(error),
                Some(libc::EINVAL | libc::EPERM | libc::EACCES) => OpenError::NoUserMode(error),
                _ => OpenError::Failed(error),
            },
        );
    }
    let device = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => {
            // SAFETY: the request takes flags and creates a descriptor.
            let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as _) };
            if fd >= 0 {
                // SAFETY: the kernel has just created this descriptor, and no other code owns it.
                return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Access::Device));
            }
            io::Error::last_os_error()
        }
        Err(error) => error,
    };
    system_call(flags).map(|fd| (fd, Access::SystemCall)).map_err(|call| {
        match call.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => OpenError::NotPermitted { device, call },
            Some(libc::ENOSYS) => OpenError::NoKernelSupport(call),
            _ => OpenError::Failed(call),
        }
    })
}

/// Opens a userfaultfd by the system call.
fn system_call(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and creates a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just created this descriptor, and no other code owns it.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes room for high numbers in this process's table of descriptors, which userfaultfds get. Call
/// it before the process starts threads. The table otherwise grows when the first userfaultfd is
/// opened, and in a process with threads the kernel waits for a grace period of RCU to do that:
/// 10 ms and more. It is an optimisation, and without effect where too many files are open.
///
/// # Examples
///
/// ```
/// // The first line of `main`.
/// demand_uffd::make_room_for_descriptors();
/// ```
pub fn make_room_for_descriptors() {
    // SAFETY: the call creates a descriptor.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd >= 0 {
        // SAFETY: the kernel has just created this descriptor, and no other code owns it.
        drop(closed_early(unsafe { OwnedFd::from_raw_fd(fd) }));
    }
}

/// Gives a descriptor a high number. When a process ends, the kernel queues its files in the order
/// of their numbers, and releases them last in, first out (`task_work_run`): the highest is closed
/// first.
fn closed_early(fd: OwnedFd) -> OwnedFd {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes the structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return fd;
    }
    let least = libc::c_int::try_from(limit.rlim_cur / 2).map_or(HIGH, |half| HIGH.min(half));
    // SAFETY: fcntl with this command touches no memory.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) } {
        // SAFETY: the kernel has just created this descriptor, and no other code owns it.
        high @ 0.. => unsafe { OwnedFd::from_raw_fd(high) },
        // Too many files are open. The low number works too, except when the process is killed.
        _ => fd,
    }
}

/// Negotiates features; returns those that the kernel has.
fn handshake(fd: &OwnedFd, features: Features) -> io::Result<Features> {
    let mut api =
        raw::uffdio_api { api: raw::UFFD_API.into(), features: features.bits(), ioctls: 0 };
    // SAFETY: the request reads and writes this structure.
    let result = unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_API.into(), &mut api) };
    if result == 0 {
        Ok(Features::from_bits(api.features))
    } else {
        Err(io::Error::last_os_error())
    }
}
