// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thin safe wrapper of the kernel's userfaultfd: operations on ranges, and messages.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use demand_memory::{MappedBytes, OwnProcess};
use linux_raw_sys::{general as raw, ioctl as request};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_iowr_nr;

use crate::open::{Accesses, check_received, open};
use crate::read::Reader;
use crate::{Access, Event, Features, Modes, OpenError, RangeError};

// linux-raw-sys has the request's structure, but neither its number nor its mode. Source:
// include/uapi/linux/userfaultfd.h.
ioctl_iowr_nr!(UFFDIO_POISON, raw::UFFDIO, raw::_UFFDIO_POISON, raw::uffdio_poison);

/// The mode of `UFFDIO_POISON` in which threads that wait for a page keep waiting.
const POISON_DONTWAKE: u64 = 1;

/// A userfaultfd of this process, or one that another process has sent.
///
/// All operations act on the address space of the process that opened it, whichever process calls
/// them. They trap accesses, map pages of memory objects that are shared anyway, and wake waiting
/// threads. Only [`copy`](Self::copy) writes content, so only that is unsafe. These
/// operations do not ensure that a range reads correctly while or after it is trapped:
/// [`ArmedMapping`](crate::ArmedMapping) and [`FaultService`](crate::FaultService) do.
///
/// # Examples
///
/// ```
/// use demand_uffd::{Features, Userfaultfd};
///
/// match Userfaultfd::open(Features::GUEST_MEMORY) {
///     Ok(uffd) => assert!(uffd.read(&mut Vec::new()).unwrap() == 0),
///     // One line: the operation, the system's answer, a remedy.
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
#[derive(Debug)]
pub struct Userfaultfd {
    // Shared with operations in progress, so that closing waits for none of them.
    fd: RwLock<Option<Arc<OwnedFd>>>,
    reader: Reader,
    /// Number of reads so far; reads at the same time may count as one.
    reads: AtomicU64,
    process: OwnProcess,
}

impl Userfaultfd {
    /// Opens a userfaultfd for this process that also traps the kernel's accesses on behalf of
    /// system calls, and negotiates `features` with the kernel.
    ///
    /// If the limit of open files allows it, its descriptor gets a high number, so that the kernel
    /// closes it early when the process is killed. Otherwise KVM might close the VM before the
    /// userfaultfd, and wait for its own faults: the process would never end.
    ///
    /// # Errors
    ///
    /// [`OpenError`], with a remedy.
    pub fn open(features: Features) -> Result<Self, OpenError> {
        Ok(Self::open_with_access(features)?.0)
    }

    /// Like [`open`](Self::open), and returns the way in which it was opened.
    pub(crate) fn open_with_access(features: Features) -> Result<(Self, Access), OpenError> {
        let (fd, access) = open(features, Accesses::All)?;
        Ok((Userfaultfd::of(fd), access))
    }

    /// Opens a userfaultfd for this process that traps accesses of user-mode code only, which needs
    /// no permission, and negotiates `features` with the kernel.
    ///
    /// An access of the kernel to a page that is not mapped is not trapped: it fails. `read`,
    /// `write` and every other system call that is given such memory returns `EFAULT`, or the
    /// number of bytes before it; KVM and vhost fail likewise. Nothing waits, and nothing reads
    /// zeros. So this suits a process that reads the memory itself (see
    /// [`LazyMap`](crate::LazyMap)), and no guest.
    ///
    /// # Errors
    ///
    /// [`OpenError`], with a remedy: [`OpenError::NoUserMode`] before Linux 5.11 and behind a seccomp
    /// filter that refuses the call.
    pub fn open_user_mode(features: Features) -> Result<Self, OpenError> {
        Ok(Userfaultfd::of(open(features, Accesses::UserMode)?.0))
    }

    /// Takes a userfaultfd that another process has opened and sent, after checking that it is one
    /// and is ready for use.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoUserfaultfd`], [`OpenError::NotInitialised`] or [`OpenError::Unusable`].
    pub fn from_received(fd: OwnedFd) -> Result<Self, OpenError> {
        check_received(&fd)?;
        Ok(Userfaultfd::of(fd))
    }

    /// Takes a userfaultfd of this process that is ready for use and does not block. For one that
    /// another process has sent use [`from_received`](Self::from_received).
    ///
    /// # Safety
    ///
    /// Reads from `fd` must return data from the kernel's userfaultfd, or at least their fork
    /// messages must contain only descriptors that no other code owns: the reader closes them.
    pub unsafe fn from_own(fd: OwnedFd) -> Self {
        Userfaultfd::of(fd)
    }

    pub(crate) fn of(fd: OwnedFd) -> Self {
        let fd = RwLock::new(Some(Arc::new(fd)));
        let (reader, reads, process) =
            (Reader::default(), AtomicU64::new(0), OwnProcess::current());
        Userfaultfd { fd, reader, reads, process }
    }

    /// Returns a duplicate of its descriptor, to be sent to another process.
    ///
    /// # Errors
    ///
    /// The operating system's error; `EBADF` after [`close`](Self::close).
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.fd()?.try_clone()
    }

    /// Closes it. Unless another process or descriptor holds it too, all of its ranges then read as
    /// the memory objects hold them, and waiting threads resume. All later operations fail.
    pub fn close(&self) {
        self.fd.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Returns whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.fd.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Registers a range, so that accesses to it are trapped. Registering a range again for more
    /// modes adds these.
    ///
    /// # Errors
    ///
    /// The operating system's error: `EINVAL` if the range is not mapped, not aligned or of the
    /// wrong kind, `EBUSY` if another userfaultfd has registered it, `ENOMEM` if the process has
    /// ended.
    pub fn register(&self, address: u64, len: u64, modes: Modes) -> Result<(), RangeError> {
        let mut register = raw::uffdio_register {
            range: raw::uffdio_range { start: address, len },
            mode: modes.bits(),
            ioctls: 0,
        };
        self.call("trap accesses to", address, len, |fd| {
            // SAFETY: the request reads and writes this structure. It changes no byte of the range,
            // only the effect of touching it.
            unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_REGISTER.into(), &mut register) }
        })
    }

    /// Stops trapping accesses to a range and wakes the threads that wait there, including those
    /// that fault meanwhile. Pages that are not in the memory object read as zeros from now on.
    ///
    /// # Errors
    ///
    /// The operating system's error: `EINVAL` if nothing is mapped there, `ENOMEM` if the process
    /// has ended.
    pub fn unregister(&self, address: u64, len: u64) -> Result<(), RangeError> {
        let range = raw::uffdio_range { start: address, len };
        self.call("stop trapping accesses to", address, len, |fd| {
            // SAFETY: the request reads this structure and changes no byte of the range.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_UNREGISTER.into(), &range) }
        })?;
        // The kernel wakes the waiters before it removes the trap. A thread that faults between the
        // two steps, holding only the lock of the mapping, would wait for ever.
        self.wake(address, len)
    }

    /// Wakes every thread blocked on a fault in the range. A thread whose page is still unmapped
    /// faults again.
    ///
    /// # Errors
    ///
    /// The operating system's error: `EINVAL` if the range is not aligned or empty.
    pub fn wake(&self, address: u64, len: u64) -> Result<(), RangeError> {
        let range = raw::uffdio_range { start: address, len };
        self.call("wake waiters in", address, len, |fd| {
            // SAFETY: the request reads this structure and changes no byte of the range.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_WAKE.into(), &range) }
        })
    }

    /// Maps pages that are already in the memory object, and wakes the threads that wait for them.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the number of bytes that were mapped before it: `EEXIST` for a page that
    /// is already mapped, `EFAULT` for one that is not in the memory object, `EAGAIN` while the
    /// layout of the address space changes or an event waits to be read, `ENOENT` if the range is
    /// not registered, `ESRCH` if the process has ended.
    pub fn r#continue(&self, address: u64, len: u64) -> Result<(), RangeError> {
        self.in_parts("map", address, len, |fd, start, len| {
            let mut argument = raw::uffdio_continue {
                range: raw::uffdio_range { start, len },
                mode: 0,
                mapped: 0,
            };
            // SAFETY: the request reads and writes this structure. It maps pages of the shared
            // object that the range is a mapping of, so each address shows the bytes that belong
            // there.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_CONTINUE.into(), &mut argument) };
            (result, argument.mapped)
        })
    }

    /// Sets poison markers on unmapped pages (Linux 6.6): an access there is an error. A thread gets
    /// SIGBUS with `BUS_MCEERR_AR`, a system call `EFAULT`. Threads that wait for a page keep
    /// waiting. [`continue`](Self::continue) and [`copy`](Self::copy) replace markers.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the number of bytes that were marked before it: `EEXIST` for a page that
    /// is mapped or marked already, and otherwise as for [`continue`](Self::continue).
    pub fn poison(&self, address: u64, len: u64) -> Result<(), RangeError> {
        self.in_parts("mark", address, len, |fd, start, len| {
            let mut argument = raw::uffdio_poison {
                range: raw::uffdio_range { start, len },
                mode: POISON_DONTWAKE,
                updated: 0,
            };
            // SAFETY: as for `register`.
            let result = unsafe { ioctl_with_mut_ref(fd, UFFDIO_POISON(), &mut argument) };
            (result, argument.updated)
        })
    }

    /// Creates missing pages in the memory object with the given content, maps them, and wakes the
    /// threads that wait there. Existing pages stay unchanged, with `EEXIST`.
    ///
    /// # Errors
    ///
    /// As for [`continue`](Self::continue), and `EFAULT` if the content cannot be read because its
    /// pages have vanished.
    ///
    /// # Safety
    ///
    /// If the userfaultfd is of this process, no Rust reference to bytes of the range may exist.
    pub unsafe fn copy(&self, address: u64, content: MappedBytes<'_>) -> Result<(), RangeError> {
        let source = content.address().as_ptr() as u64;
        self.in_parts("copy content to", address, content.len() as u64, |fd, start, len| {
            let mut argument = raw::uffdio_copy {
                dst: start,
                src: source + (start - address),
                len,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the request reads and writes this structure, and reads the part of `content`
            // that belongs to this part of the range. By the caller's guarantee no reference points
            // to the pages that it writes.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_COPY.into(), &mut argument) };
            (result, argument.copy)
        })
    }

    /// Reads the available messages, at most a batch, and appends them to `events`. Returns their
    /// number, 0 if there are none.
    ///
    /// It never waits for a message, even if the process that sent the descriptor makes it
    /// blocking. Linux before 6.10 can only guarantee this unless that happens at the very moment
    /// of the call.
    ///
    /// # Errors
    ///
    /// The operating system's error; `EBADF` after [`close`](Self::close).
    pub fn read(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        self.reads.store(self.reads() + 1, Ordering::Relaxed);
        self.reader.read(&*self.fd()?, events)
    }

    /// Returns the number of reads so far.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Returns whether a message waits to be read.
    pub(crate) fn has_messages(&self) -> bool {
        let Ok(fd) = self.fd() else { return false };
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as the count says.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & libc::POLLIN != 0 }
    }

    /// Returns whether the process behind it still has its address space. `address` is any address
    /// in it.
    pub(crate) fn is_process_alive(&self, address: u64) -> bool {
        let argument = raw::uffdio_writeprotect {
            range: raw::uffdio_range { start: address & !0xfff, len: 4096 },
            mode: 0,
        };
        let result = self.call("probe", address, 4096, |fd| {
            // SAFETY: the request reads this structure. Removing write protection that is not set
            // changes nothing.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_WRITEPROTECT.into(), &argument) }
        });
        !matches!(result, Err(error) if error.cause() == crate::Cause::ProcessGone)
    }

    /// Returns the descriptor, which stays open while the operation uses it.
    pub(crate) fn fd(&self) -> io::Result<Arc<OwnedFd>> {
        let fd = self.fd.read().unwrap_or_else(PoisonError::into_inner);
        fd.clone().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn call(
        &self,
        operation: &'static str,
        address: u64,
        len: u64,
        call: impl FnOnce(&Descriptor) -> libc::c_int,
    ) -> Result<(), RangeError> {
        let error = match self.fd() {
            // The request would change the memory of the parent.
            Ok(_) if !self.process.is_current() => {
                io::Error::other("it belongs to the process that has forked this one")
            }
            Ok(fd) if call(&Descriptor(fd.as_raw_fd())) == 0 => return Ok(()),
            Ok(_) => io::Error::last_os_error(),
            Err(error) => error,
        };
        Err(RangeError { operation, address, len, done: 0, source: error })
    }

    /// Runs an operation on a range that the kernel may do in parts. `call` returns the result of
    /// the request, and the count from its structure: bytes done, or a negative error.
    fn in_parts(
        &self,
        operation: &'static str,
        address: u64,
        len: u64,
        mut call: impl FnMut(&Descriptor, u64, u64) -> (libc::c_int, i64),
    ) -> Result<(), RangeError> {
        let mut done = 0;
        let failed = |done, source| Err(RangeError { operation, address, len, done, source });
        let fd = match self.fd() {
            Ok(fd) => fd,
            Err(error) => return failed(0, error),
        };
        loop {
            let (result, count) = call(&Descriptor(fd.as_raw_fd()), address + done, len - done);
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // If a part was done, EAGAIN hides why the rest was not: the next call reveals the
            // cause. Any other count is an error number that the system has already reported, or
            // was not written.
            match u64::try_from(count) {
                Ok(part @ 1..) if part < len - done => done += part,
                _ => return failed(done, error),
            }
        }
    }
}

/// A descriptor that the caller keeps open, in the form that the request functions take.
struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use demand_memory::{Backing, BackingKind, MemfdBacking, PAGE_SIZE};

    use super::*;

    #[test]
    fn own_process_is_alive() {
        let backing = MemfdBacking::new(BackingKind::Shmem, PAGE_SIZE).unwrap();
        let mapping = backing.map().unwrap();
        let base = mapping.address().as_ptr() as u64;
        let uffd = Userfaultfd::open(Features::GUEST_MEMORY).unwrap();
        assert!(uffd.is_process_alive(base));
        uffd.register(base, PAGE_SIZE, Modes::ALL).unwrap();
        assert!(uffd.is_process_alive(base));
    }
}
