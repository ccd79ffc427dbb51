// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thin safe wrapper of the kernel's userfaultfd.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use demand_memory::MappedBytes;
use linux_raw_sys::{general as raw, ioctl as request};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use crate::event::{MESSAGE, Message};
use crate::{Access, Event, Features, Modes, OpenError, RangeError};

ioctl_io_nr!(USERFAULTFD_IOC_NEW, raw::USERFAULTFD_IOC, 0);

/// Number of messages in one read.
const BATCH: usize = 16;

/// A userfaultfd of this process, or one that another process has sent.
///
/// All operations act on the address space of the process that opened it, whichever process calls
/// them. They trap accesses, map pages of memory objects that are shared anyway, and wake waiting
/// threads. Only the copies ([`copy`](Self::copy)) write content, so only those are unsafe. These
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
/// // One line: the operation, the system's answer, a remedy.
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
#[derive(Debug)]
pub struct Userfaultfd {
    // Shared with operations in progress, so that closing waits for none of them.
    fd: RwLock<Option<Arc<OwnedFd>>>,
    /// Whether the kernel lacks reads that never wait by their own flags, so that those of the
    /// descriptor decide.
    flags_decide: AtomicBool,
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
        let (fd, _) = open_fd()?;
        if handshake(&fd, features).is_ok() {
            return Ok(Userfaultfd::of(closed_early(fd)));
        }
        // A refused handshake does not name the cause: query the kernel's features, and compare.
        let lacking = features.without(Self::kernel_features()?);
        Err(OpenError::Features { wanted: features, lacking })
    }

    /// Returns the features that the kernel has.
    ///
    /// # Errors
    ///
    /// [`OpenError`], with a remedy.
    pub fn kernel_features() -> Result<Features, OpenError> {
        Self::ask().map(|(features, _)| features)
    }

    /// Returns the features that the kernel has, and the way in which this process could query
    /// them.
    pub(crate) fn ask() -> Result<(Features, Access), OpenError> {
        let (fd, access) = open_fd()?;
        let features = handshake(&fd, Features::NONE).map_err(OpenError::Failed)?;
        Ok((features, access))
    }

    /// Takes a userfaultfd that another process has opened and sent, after checking that it is one
    /// and is ready for use.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoUserfaultfd`] describes the descriptor instead.
    pub fn from_received(fd: OwnedFd) -> Result<Self, OpenError> {
        let refuse = |what: String| Err(OpenError::NoUserfaultfd(what));
        match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(name) if name.as_os_str() == "anon_inode:[userfaultfd]" => {}
            Ok(name) => return refuse(format!("{}, not a userfaultfd", name.display())),
            // Without /proc the request below decides, but only among files without a file type. A
            // device can answer a request in any way, and its reads can return anything that the
            // sender likes.
            Err(_) => match is_anonymous(&fd) {
                Ok(true) => {}
                Ok(false) => return refuse("a file or a device, not a userfaultfd".into()),
                Err(error) => return refuse(format!("unusable ({error})")),
            },
        }
        // SAFETY: fcntl with these commands touches no memory.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above. A blocking userfaultfd cannot be polled.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return refuse(format!("unusable ({})", io::Error::last_os_error()));
        }
        let nothing = raw::uffdio_range { start: 0, len: 0 };
        // SAFETY: the request reads a range of this type; an empty one does nothing.
        unsafe { ioctl_with_ref(&fd, request::UFFDIO_WAKE.into(), &nothing) };
        let answer = io::Error::last_os_error();
        if answer.raw_os_error() != Some(libc::EINVAL) {
            return refuse(format!("not a userfaultfd ({answer})"));
        }
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as the count says.
        if unsafe { libc::poll(&mut poll, 1, 0) } < 0 || poll.revents & libc::POLLERR != 0 {
            return refuse("a userfaultfd that was never initialised with UFFDIO_API".into());
        }
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

    fn of(fd: OwnedFd) -> Self {
        let fd = RwLock::new(Some(Arc::new(fd)));
        Userfaultfd { fd, flags_decide: AtomicBool::new(false) }
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

    /// Maps zeroed pages in place of missing ones, and wakes the threads that wait there. Without a
    /// userfaultfd an access would have found the same.
    ///
    /// # Errors
    ///
    /// As for [`continue`](Self::continue); `EINVAL` on huge pages.
    pub fn zeropage(&self, address: u64, len: u64) -> Result<(), RangeError> {
        self.in_parts("map zeros into", address, len, |fd, start, len| {
            let mut argument = raw::uffdio_zeropage {
                range: raw::uffdio_range { start, len },
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: the request reads and writes this structure. It creates only pages that do
            // not exist, with the zeros that they would have held anyway.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_ZEROPAGE.into(), &mut argument) };
            (result, argument.zeropage)
        })
    }

    /// Creates missing pages in the memory object with the given content, maps them, and wakes the
    /// threads that wait there. Existing pages stay unchanged, with `EEXIST`.
    ///
    /// # Errors
    ///
    /// As for [`continue`](Self::continue).
    ///
    /// # Safety
    ///
    /// If the userfaultfd is of this process, no Rust reference to bytes of the range may exist.
    pub unsafe fn copy(&self, address: u64, content: &[u8]) -> Result<(), RangeError> {
        // SAFETY: a slice is mapped and does not change while it is borrowed; the rest is the
        // caller's guarantee.
        unsafe {
            let content = MappedBytes::new(NonNull::from(content).cast(), content.len());
            self.copy_mapped(address, content)
        }
    }

    /// Like [`copy`](Self::copy), with content whose pages may have vanished, which is an `EFAULT`.
    ///
    /// # Errors
    ///
    /// As for [`continue`](Self::continue), and `EFAULT` if the content cannot be read.
    ///
    /// # Safety
    ///
    /// As for [`copy`](Self::copy).
    pub unsafe fn copy_mapped(
        &self,
        address: u64,
        content: MappedBytes<'_>,
    ) -> Result<(), RangeError> {
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
        let fd = self.fd()?;
        let mut messages = [[0u8; MESSAGE]; BATCH];
        loop {
            let read = match self.read_now(&fd, &mut messages) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) => return Err(error),
            };
            let count = read / MESSAGE;
            for message in &messages[..count] {
                // SAFETY: the kernel has just written this message, and it is converted once.
                events.push(unsafe { Message::decode(message).into_event() });
            }
            return Ok(count);
        }
    }

    /// Returns whether a message waits to be read.
    pub(crate) fn has_messages(&self) -> bool {
        let Ok(fd) = self.fd() else { return false };
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as the count says.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & libc::POLLIN != 0 }
    }

    /// Reads the available messages once; returns their length in bytes. The process that sent the
    /// descriptor shares its flags, and could make a read wait at any time, so this read passes its
    /// own flag.
    fn read_now(&self, fd: &OwnedFd, messages: &mut [[u8; MESSAGE]; BATCH]) -> io::Result<usize> {
        if self.flags_decide.load(Ordering::Relaxed) {
            return read_by_flags(fd, messages);
        }
        let len = size_of_val(messages);
        let part = libc::iovec { iov_base: messages.as_mut_ptr().cast(), iov_len: len };
        // -1, in both halves, means the file's own position; a userfaultfd has none.
        let (count, position): (libc::c_ulong, libc::c_long) = (1, -1);
        // SAFETY: the kernel reads one iovec, as the count says, and writes at most its bytes,
        // which are those of the array. Both live until the call returns, and no other code uses
        // them before.
        let read = unsafe {
            let fd = fd.as_raw_fd();
            let flags = libc::RWF_NOWAIT;
            libc::syscall(libc::SYS_preadv2, fd, &part, count, position, position, flags)
        };
        if let Ok(read) = usize::try_from(read) {
            return Ok(read);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Nothing was read: this kernel accepts no flags for reads of a userfaultfd.
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ESPIPE | libc::ENOSYS) => {
                self.flags_decide.store(true, Ordering::Relaxed);
                read_by_flags(fd, messages)
            }
            _ => Err(error),
        }
    }

    /// Returns whether the process behind it still has its address space. `address` is any address
    /// in it.
    pub fn is_process_alive(&self, address: u64) -> bool {
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
            Ok(fd) if call(&Descriptor(fd.as_raw_fd())) == 0 => return Ok(()),
            Ok(_) => io::Error::last_os_error(),
            Err(error) => error,
        };
        Err(RangeError { operation, address, len, done: 0, error })
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
        let failed = |done, error| Err(RangeError { operation, address, len, done, error });
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

/// Returns whether a descriptor refers to an anonymous file of the kernel, as that of a userfaultfd
/// does: only such files have no file type.
fn is_anonymous(fd: &OwnedFd) -> io::Result<bool> {
    Ok(File::from(fd.try_clone()?).metadata()?.mode() & libc::S_IFMT == 0)
}

/// A descriptor that the caller keeps open, in the form that the request functions take.
struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Reads the available messages; only the descriptor's flags keep the read from waiting.
fn read_by_flags(fd: &OwnedFd, messages: &mut [[u8; MESSAGE]; BATCH]) -> io::Result<usize> {
    // SAFETY: fcntl with this command touches no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags & libc::O_NONBLOCK == 0 {
        return Err(io::Error::other("the other process made its userfaultfd blocking"));
    }
    let len = size_of_val(messages);
    // SAFETY: the kernel writes at most the bytes of the array.
    let read = unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), len) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Opens a descriptor of a userfaultfd that is not ready for use yet.
fn open_fd() -> Result<(OwnedFd, Access), OpenError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
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
    // SAFETY: the call takes flags and creates a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if let Ok(fd @ 0..) = RawFd::try_from(fd) {
        // SAFETY: the kernel has just created this descriptor, and no other code owns it.
        return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Access::SystemCall));
    }
    let call = io::Error::last_os_error();
    Err(match call.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => OpenError::NotPermitted { device, call },
        Some(libc::ENOSYS) => OpenError::NoKernelSupport(call),
        _ => OpenError::Failed(call),
    })
}

/// The lowest number of a userfaultfd's descriptor: higher than a VMM's number of descriptors, and
/// normally below the limit of open files.
const HIGH: u64 = 512;

/// Gives a descriptor a high number. When a process ends, the kernel queues its files in the order
/// of their numbers, and releases them last in, first out (`task_work_run`): the highest is closed
/// first.
fn closed_early(fd: OwnedFd) -> OwnedFd {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes the structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return fd;
    }
    let least = HIGH.min(limit.rlim_cur / 2) as libc::c_int;
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// A process that holds a descriptor of the same userfaultfd can make it blocking at any time.
    #[test]
    fn read_never_blocks_despite_blocking_flags() {
        let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
        assert_eq!(uffd.read(&mut Vec::new()).unwrap(), 0);
        let theirs = uffd.try_clone_fd().unwrap();
        // SAFETY: fcntl with this command touches no memory.
        assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFL, 0) }, 0);
        let (sender, receiver) = mpsc::channel();
        let reader = uffd.clone();
        thread::spawn(move || sender.send(reader.read(&mut Vec::new())));
        let read = receiver.recv_timeout(Duration::from_secs(20)).expect("the read returns");
        if uffd.flags_decide.load(Ordering::Relaxed) {
            // An older kernel: the change is noticed, unless it happens at the moment of the read.
            assert!(read.unwrap_err().to_string().contains("blocking"));
            if std::env::var("LAB").is_err() {
                println!("SKIPPED: a read of a userfaultfd that takes flags needs Linux 6.10");
            }
            return;
        }
        assert_eq!(read.unwrap(), 0);
    }

    #[test]
    fn read_without_flags_checks_the_descriptors_flags() {
        let uffd = Userfaultfd::open(Features::GUEST_MEMORY).unwrap();
        uffd.flags_decide.store(true, Ordering::Relaxed);
        assert_eq!(uffd.read(&mut Vec::new()).unwrap(), 0);
        let theirs = uffd.try_clone_fd().unwrap();
        // SAFETY: fcntl with this command touches no memory.
        assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFL, 0) }, 0);
        assert!(uffd.read(&mut Vec::new()).unwrap_err().to_string().contains("blocking"));
    }
}
