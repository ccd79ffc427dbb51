// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong with a userfaultfd.

use std::io;

use crate::Features;

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// This process may not have one that serves faults of the kernel.
    #[error(
        "open a userfaultfd that serves faults of the kernel: /dev/userfaultfd: {device}; system \
         call: {call}; let this user read and write /dev/userfaultfd, or give the process \
         CAP_SYS_PTRACE"
    )]
    NotPermitted {
        /// What the system said of the device.
        device: io::Error,
        /// What the system said of the call.
        call: io::Error,
    },
    /// The kernel has none.
    #[error(
        "open a userfaultfd: the kernel has no such call ({0}); use a kernel built with \
         CONFIG_USERFAULTFD"
    )]
    NoKernelSupport(io::Error),
    /// The kernel gave none for another reason.
    #[error("open a userfaultfd: {0}; raise the limit that it names, or free what it counts")]
    Failed(io::Error),
    /// The kernel lacks features.
    #[error(
        "open a userfaultfd with the features {wanted}: the kernel lacks {lacking}; use a newer \
         kernel, or one that was built with them"
    )]
    Features {
        /// What was asked for.
        wanted: Features,
        /// What of it is not there.
        lacking: Features,
    },
    /// A descriptor that came from elsewhere is no userfaultfd.
    #[error(
        "take a userfaultfd from another process: the descriptor is {0}; the process is at fault"
    )]
    NoUserfaultfd(String),
}

/// Why an operation on a range failed, as far as it matters to whoever serves faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// A page is mapped there already.
    Exists,
    /// The layout of the address space is changing, or an event waits to be read: to be tried
    /// again.
    Again,
    /// The kernel is short of memory, for page tables in most cases, or the limit of somebody who
    /// pays for it is reached: to be tried again after a while. Registering a range and taking it
    /// back say so too if the process is gone.
    NoMemory,
    /// The range, or a part of it, is not registered any more.
    NotRegistered,
    /// The process is gone.
    ProcessGone,
    /// The memory object has no such page.
    NoPage,
    /// The userfaultfd was closed.
    Closed,
    /// Anything else.
    Other,
}

/// An operation on a range of addresses that failed.
#[derive(Debug, thiserror::Error)]
#[error(
    "{operation} {len} bytes at address {address:#x} through a userfaultfd: {error} after {done} \
     bytes; {}", self.advice()
)]
pub struct RangeError {
    /// What was to be done.
    pub operation: &'static str,
    /// First address of the range, in the process behind the userfaultfd.
    pub address: u64,
    /// Length of the range, in bytes.
    pub len: u64,
    /// Bytes from the first address on for which it was done.
    pub done: u64,
    /// What the system said.
    pub error: io::Error,
}

impl RangeError {
    /// Why the operation failed.
    pub fn cause(&self) -> Cause {
        match self.error.raw_os_error() {
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
            Cause::Exists => "the rest can be gone on with",
            Cause::Again => "try again, and read the userfaultfd's events meanwhile",
            Cause::NoMemory => {
                "free memory or raise its limit, unless the process has ended, and try again"
            }
            Cause::NotRegistered => "register the range, and keep it mapped",
            Cause::ProcessGone => "the process has ended; nobody needs the range any more",
            Cause::NoPage => "the memory object must hold the pages first",
            Cause::Closed => "the userfaultfd was closed; nobody is trapped any more",
            Cause::Other => {
                "the range must be page aligned, mapped from shared memory or huge pages, and \
                 registered with no other userfaultfd"
            }
        }
    }
}

impl From<RangeError> for io::Error {
    fn from(error: RangeError) -> Self {
        io::Error::new(error.error.kind(), error)
    }
}

/// Why a fault service could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The system refused what a service needs to run.
    #[error("{asked}: {error}; raise the limit that it names, or free what it counts")]
    System {
        /// What was to be done.
        asked: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Pages are still missing.
    #[error(
        "stop trapping accesses: {missing} pages are still missing, and would read as zeros; wait \
         until the last one is present"
    )]
    Incomplete {
        /// Number of missing pages.
        missing: u64,
    },
    /// The service was stopped.
    #[error("serve faults: the service was stopped; start another one")]
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
            error: io::Error::from_raw_os_error(errno),
        }
    }

    #[test]
    fn errors_are_one_line_and_say_what_to_do() {
        let text = error(libc::ENOENT).to_string();
        assert!(text.starts_with("map 8192 bytes at address 0x1000"), "{text}");
        assert!(text.contains("after 4096 bytes") && text.contains("register the range"), "{text}");
        assert!(!text.contains('\n'));
        let denied = OpenError::NotPermitted {
            device: io::Error::from_raw_os_error(libc::EACCES),
            call: io::Error::from_raw_os_error(libc::EPERM),
        };
        let text = denied.to_string();
        assert!(text.contains("/dev/userfaultfd") && text.contains("CAP_SYS_PTRACE"), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    }

    #[test]
    fn causes_are_told_apart() {
        assert_eq!(error(libc::EEXIST).cause(), Cause::Exists);
        assert_eq!(error(libc::EAGAIN).cause(), Cause::Again);
        assert_eq!(error(libc::ENOMEM).cause(), Cause::NoMemory);
        assert_eq!(error(libc::ESRCH).cause(), Cause::ProcessGone);
        assert_eq!(error(libc::EINVAL).cause(), Cause::Other);
        assert_eq!(io::Error::from(error(libc::EAGAIN)).kind(), io::ErrorKind::WouldBlock);
    }
}
