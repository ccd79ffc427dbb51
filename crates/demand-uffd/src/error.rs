// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of userfaultfds and of the fault service.

use std::io;

use crate::Features;

/// Errors from opening or receiving a userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This process may not open a userfaultfd that serves faults of the kernel.
    #[error(
        "cannot open a userfaultfd that handles faults of the kernel: {device} (/dev/userfaultfd), \
         {call} (system call); let this user read and write /dev/userfaultfd, give the process \
         CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted {
        /// Error from opening the device.
        device: io::Error,
        /// Error from the system call.
        #[source]
        call: io::Error,
    },
    /// The kernel or a seccomp filter refuses a userfaultfd for accesses of user-mode code.
    #[error(
        "cannot open a userfaultfd for accesses of user-mode code: {0}; use Linux 5.11 or newer, \
         and let the seccomp filter of the container or service pass the system call userfaultfd"
    )]
    NoUserMode(#[source] io::Error),
    /// The kernel has no userfaultfd.
    #[error(
        "cannot open a userfaultfd: the kernel has no such call ({0}); use a kernel built with \
         CONFIG_USERFAULTFD"
    )]
    NoKernelSupport(#[source] io::Error),
    /// The kernel refused for another reason.
    #[error("cannot open a userfaultfd: {0}; raise the limit that it names, or free resources")]
    Failed(#[source] io::Error),
    /// The kernel lacks features.
    #[error(
        "cannot open a userfaultfd with the features {wanted}: the kernel lacks {lacking}; use a \
         newer kernel, or one built with them"
    )]
    Features {
        /// The features that the caller asked for.
        wanted: Features,
        /// Those of them that the kernel lacks.
        lacking: Features,
    },
    /// A received descriptor is of another kind.
    #[error(
        "cannot use a userfaultfd of another process: the descriptor is {found}, not a \
         userfaultfd; this is a bug in that process"
    )]
    NoUserfaultfd {
        /// A description of the descriptor.
        found: String,
    },
    /// A received userfaultfd is not ready for use.
    #[error(
        "cannot use a userfaultfd of another process: it was never initialised with UFFDIO_API; \
         this is a bug in that process"
    )]
    NotInitialised,
    /// A received descriptor could not be examined or changed.
    #[error("cannot use a userfaultfd of another process: its descriptor is unusable: {0}")]
    Unusable(#[source] io::Error),
}

/// The causes of a [`RangeError`] that code serving faults must tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// A page is already mapped there.
    Exists,
    /// The layout of the address space is changing, or an event waits to be read. Try again.
    Again,
    /// The kernel is short of memory, in most cases for page tables, or a limit that the memory
    /// counts against is reached. Try again after a pause. Registering and unregistering a range
    /// also fail with this if the process has ended.
    NoMemory,
    /// The range, or a part of it, is no longer registered.
    NotRegistered,
    /// The process has ended.
    ProcessGone,
    /// The memory object does not contain the page.
    NoPage,
    /// The userfaultfd was closed.
    Closed,
    /// Any other cause.
    Other,
}

/// Error for a failed operation on a range of addresses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[error(
    "cannot {operation} {len} bytes at address {address:#x} through a userfaultfd: {source} after \
     {done} bytes; {}", self.advice()
)]
pub struct RangeError {
    /// The operation, as a verb phrase.
    pub operation: &'static str,
    /// First address of the range, in the process behind the userfaultfd.
    pub address: u64,
    /// Length of the range, in bytes.
    pub len: u64,
    /// Bytes from the first address on for which the operation succeeded.
    pub done: u64,
    /// Error from the operating system.
    pub source: io::Error,
}

impl RangeError {
    /// Returns the cause of the failure.
    pub fn cause(&self) -> Cause {
        match self.source.raw_os_error() {
            Some(libc::EEXIST) => Cause::Exists,
            Some(libc::EAGAIN) => Cause::Again,
            Some(libc::ENOMEM) => Cause::NoMemory,
            Some(libc::ENOENT) => Cause::NotRegistered,
            Some(libc::ESRCH) => Cause::ProcessGone,
            Some(libc::EFAULT) => Cause::NoPage,
            Some(libc::EBADF) => Cause::Closed,
            _ => Cause::Other,
        }
    }

    fn advice(&self) -> &'static str {
        match self.cause() {
            Cause::Exists => "continue after the page that is mapped",
            Cause::Again => "read the userfaultfd's events, and try again",
            Cause::NoMemory => {
                "free memory or raise its limit, unless the process has ended, and try again"
            }
            Cause::NotRegistered => "register the range, and keep it mapped",
            Cause::ProcessGone => "the process has ended and needs the range no longer",
            Cause::NoPage => "populate the memory object first",
            Cause::Closed => "the userfaultfd was closed and traps no accesses any more",
            Cause::Other => {
                "use a range that is page aligned, mapped from shared memory or huge pages, and \
                 not registered with another userfaultfd"
            }
        }
    }
}

impl From<RangeError> for io::Error {
    fn from(error: RangeError) -> Self {
        io::Error::new(error.source.kind(), error)
    }
}

/// Errors from the fault service.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The operating system refused a resource that the service needs.
    #[error("cannot {operation}: {source}; raise the limit that it names, or free resources")]
    System {
        /// The operation, as a verb phrase.
        operation: &'static str,
        /// Error from the operating system.
        source: io::Error,
    },
    /// Pages are still missing.
    #[error(
        "cannot unregister: {missing} pages are still missing and would read as zeros; wait until \
         all are present"
    )]
    Incomplete {
        /// Number of missing pages.
        missing: u64,
    },
    /// The service was stopped.
    #[error("cannot serve faults: the service was stopped; start another one")]
    Stopped,
    /// A range could not be released.
    #[error(transparent)]
    Range(#[from] RangeError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32) -> RangeError {
        RangeError {
            operation: "map",
            address: 0x1000,
            len: 8192,
            done: 4096,
            source: io::Error::from_raw_os_error(errno),
        }
    }

    #[test]
    fn errors_are_one_line_with_advice() {
        let text = error(libc::ENOENT).to_string();
        assert!(text.starts_with("cannot map 8192 bytes at address 0x1000"), "{text}");
        assert!(text.contains("after 4096 bytes") && text.contains("register the range"), "{text}");
        assert!(!text.contains('\n'));
        let denied = OpenError::NotPermitted {
            device: io::Error::from_raw_os_error(libc::EACCES),
            call: io::Error::from_raw_os_error(libc::EPERM),
        };
        let text = denied.to_string();
        for way in ["/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd"] {
            assert!(text.contains(way), "{text}");
        }
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    }

    #[test]
    fn causes_are_chained() {
        use std::error::Error as _;
        let cause = error(libc::ENOENT).source().expect("it has a cause").to_string();
        assert!(error(libc::ENOENT).to_string().contains(&cause), "{cause}");
        let call = io::Error::from_raw_os_error(libc::EPERM);
        let device = io::Error::from_raw_os_error(libc::EACCES);
        assert!(OpenError::NotPermitted { device, call }.source().is_some());
        assert!(ServiceError::from(error(libc::ENOENT)).source().is_some());
    }

    #[test]
    fn causes_are_distinguished() {
        assert_eq!(error(libc::EEXIST).cause(), Cause::Exists);
        assert_eq!(error(libc::EAGAIN).cause(), Cause::Again);
        assert_eq!(error(libc::ENOMEM).cause(), Cause::NoMemory);
        assert_eq!(error(libc::ESRCH).cause(), Cause::ProcessGone);
        assert_eq!(error(libc::EINVAL).cause(), Cause::Other);
        assert_eq!(io::Error::from(error(libc::EAGAIN)).kind(), io::ErrorKind::WouldBlock);
    }
}
