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

/// Messages that are read at once.
const BATCH: usize = 16;

/// A userfaultfd: of this process, or of another one that has sent it.
///
/// All operations act on the address space of the process that opened it, whoever calls them.
/// They trap accesses, map pages of memory objects that are shared anyway, and let those go on
/// that wait; none but the copies ([`copy`](Self::copy)) writes content, so none but those are
/// unsafe. What a range reads as while or after it is trapped is another matter:
/// [`ArmedMapping`](crate::ArmedMapping) and [`FaultService`](crate::FaultService) see to it.
///
/// # Examples
///
/// ```
/// use demand_uffd::{Features, Userfaultfd};
///
/// match Userfaultfd::open(Features::GUEST_MEMORY) {
///     Ok(uffd) => assert!(uffd.read(&mut Vec::new()).unwrap() == 0),
///     // One line: what was asked, what the system said, what to do.
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
#[derive(Debug)]
pub struct Userfaultfd {
    // Shared with operations under way: closing waits for none of them.
    fd: RwLock<Option<Arc<OwnedFd>>>,
    /// Whether the kernel knows no read that never waits, whatever the descriptor's flags say.
    flags_decide: AtomicBool,
}

impl Userfaultfd {
    /// Opens a userfaultfd for this process, which also traps what the kernel touches on behalf
    /// of system calls, and agrees on `features` with the kernel.
    ///
    /// Its descriptor gets a high number, if the limit of open files allows it, so that the kernel
    /// closes it early when the process is killed. A VM that KVM closes before the userfaultfd waits
    /// for its own faults, and the process never ends.
    ///
    /// # Errors
    ///
    /// [`OpenError`] with what to do.
    pub fn open(features: Features) -> Result<Self, OpenError> {
        let (fd, _) = open_fd()?;
        if handshake(&fd, features).is_ok() {
            return Ok(Userfaultfd::of(closed_early(fd)));
        }
        // A refused handshake does not say why: ask again for nothing, and compare.
        let lacking = features.without(Self::kernel_features()?);
        Err(OpenError::Features { wanted: features, lacking })
    }

    /// The features that the kernel has.
    ///
    /// # Errors
    ///
    /// [`OpenError`] with what to do.
    pub fn kernel_features() -> Result<Features, OpenError> {
        Self::ask().map(|(features, _)| features)
    }

    /// The features that the kernel has, and how this process was let ask.
    pub(crate) fn ask() -> Result<(Features, Access), OpenError> {
        let (fd, access) = open_fd()?;
        let features = handshake(&fd, Features::NONE).map_err(OpenError::Failed)?;
        Ok((features, access))
    }

    /// Takes a userfaultfd that another process has opened and sent, after making sure that it is
    /// one, and ready for use.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoUserfaultfd`] says what it is instead.
    pub fn from_received(fd: OwnedFd) -> Result<Self, OpenError> {
        let refuse = |what: String| Err(OpenError::NoUserfaultfd(what));
        match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(name) if name.as_os_str() == "anon_inode:[userfaultfd]" => {}
            Ok(name) => return refuse(format!("{}, not a userfaultfd", name.display())),
            // Without /proc the request below tells, of those files that have no name at all. A
            // device can answer a request as it likes, and be read as what the sender likes.
            Err(_) => match is_anonymous(&fd) {
                Ok(true) => {}
                Ok(false) => return refuse("a file or a device, not a userfaultfd".into()),
                Err(error) => return refuse(format!("unusable ({error})")),
            },
        }
        // SAFETY: fcntl with these commands touches no memory.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above. A userfaultfd that blocks cannot be polled.
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

    /// Takes a userfaultfd of one's own that is ready for use and does not block. For one that
    /// another process has sent use [`from_received`](Self::from_received).
    ///
    /// # Safety
    ///
    /// What is read from `fd` must come from the kernel's userfaultfd, or name in its messages of
    /// forks only descriptors that nobody else owns: whoever reads them closes them.
    pub unsafe fn from_own(fd: OwnedFd) -> Self {
        Userfaultfd::of(fd)
    }

    fn of(fd: OwnedFd) -> Self {
        let fd = RwLock::new(Some(Arc::new(fd)));
        Userfaultfd { fd, flags_decide: AtomicBool::new(false) }
    }

    /// A descriptor of it, to be sent to another process.
    ///
    /// # Errors
    ///
    /// The system's; `EBADF` after [`close`](Self::close).
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.fd()?.try_clone()
    }

    /// Closes it. If nobody else holds it, all its ranges read as they lie in their memory
    /// objects from now on, and whoever waits goes on. Operations from now on fail.
    pub fn close(&self) {
        self.fd.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.fd.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Registers a range, so that its accesses are trapped. Registering one again for more modes
    /// adds these.
    ///
    /// # Errors
    ///
    /// The system's: `EINVAL` if the range is not mapped, not aligned or of the wrong kind,
    /// `EBUSY` if another userfaultfd has it, `ENOMEM` if the process is gone.
    pub fn register(&self, address: u64, len: u64, modes: Modes) -> Result<(), RangeError> {
        let mut register = raw::uffdio_register {
            range: raw::uffdio_range { start: address, len },
            mode: modes.bits(),
            ioctls: 0,
        };
        self.call("trap accesses to", address, len, |fd| {
            // SAFETY: the request reads and writes this structure. It changes no byte of the
            // range, only who is told when it is touched.
            unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_REGISTER.into(), &mut register) }
        })
    }

    /// Stops trapping accesses to a range and lets those go on that wait there, also those that
    /// came just then. Pages that are not in the memory object read as zeros from now on.
    ///
    /// # Errors
    ///
    /// The system's: `EINVAL` if nothing is mapped there, `ENOMEM` if the process is gone.
    pub fn unregister(&self, address: u64, len: u64) -> Result<(), RangeError> {
        let range = raw::uffdio_range { start: address, len };
        self.call("stop trapping accesses to", address, len, |fd| {
            // SAFETY: the request reads this structure and changes no byte of the range.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_UNREGISTER.into(), &range) }
        })?;
        // The kernel wakes who waits before it takes the trap away. Who comes between the two,
        // under the lock of the mapping alone, would wait for ever.
        self.wake(address, len)
    }

    /// Lets those go on that wait in a range; who finds nothing mapped waits again.
    ///
    /// # Errors
    ///
    /// The system's: `EINVAL` if the range is not aligned or empty.
    pub fn wake(&self, address: u64, len: u64) -> Result<(), RangeError> {
        let range = raw::uffdio_range { start: address, len };
        self.call("wake who waits in", address, len, |fd| {
            // SAFETY: the request reads this structure and changes no byte of the range.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_WAKE.into(), &range) }
        })
    }

    /// Maps pages that are in the memory object already, and lets those go on that wait there.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the bytes that were mapped before it: `EEXIST` for a page that is
    /// mapped, `EFAULT` for one that the memory object does not have, `EAGAIN` while the layout
    /// of the address space changes or an event waits to be read, `ENOENT` if the range is not
    /// registered, `ESRCH` if the process is gone.
    pub fn r#continue(&self, address: u64, len: u64) -> Result<(), RangeError> {
        self.in_parts("map", address, len, |fd, start, len| {
            let mut argument = raw::uffdio_continue {
                range: raw::uffdio_range { start, len },
                mode: 0,
                mapped: 0,
            };
            // SAFETY: the request reads and writes this structure. It maps pages of the shared
            // object that the range is a mapping of, so it shows their bytes where they belong.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_CONTINUE.into(), &mut argument) };
            (result, argument.mapped)
        })
    }

    /// Maps zeroed pages where pages are missing, and lets those go on that wait there. It is
    /// what a touch would have found without a userfaultfd.
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
            // SAFETY: the request reads and writes this structure. It fills only pages that are
            // not there, with what they would have held anyway.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_ZEROPAGE.into(), &mut argument) };
            (result, argument.zeropage)
        })
    }

    /// Brings missing pages into the memory object with the given content, maps them, and lets
    /// those go on that wait there. Pages that exist are left alone, with `EEXIST`.
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
        // caller's promise.
        unsafe {
            let content = MappedBytes::new(NonNull::from(content).cast(), content.len());
            self.copy_mapped(address, content)
        }
    }

    /// As [`copy`](Self::copy), with content that may have vanished: `EFAULT` then.
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
        self.in_parts("copy pages to", address, content.len() as u64, |fd, start, len| {
            let mut argument = raw::uffdio_copy {
                dst: start,
                src: source + (start - address),
                len,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the request reads and writes this structure, and reads the part of
            // `content` that belongs to this part of the range. What it writes are pages that no
            // reference points to, by the caller's promise.
            let result =
                unsafe { ioctl_with_mut_ref(fd, request::UFFDIO_COPY.into(), &mut argument) };
            (result, argument.copy)
        })
    }

    /// Reads the messages that are there, at most a batch, behind those in `events`; returns
    /// their number, 0 if there are none.
    ///
    /// It never waits for one, even if the process that sent the descriptor makes it blocking.
    /// Linux before 6.10 can promise that only as long as that does not happen at the very moment
    /// of the call.
    ///
    /// # Errors
    ///
    /// The system's; `EBADF` after [`close`](Self::close).
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
                // SAFETY: the kernel has just written this message, and it is taken once.
                events.push(unsafe { Message::decode(message).into_event() });
            }
            return Ok(count);
        }
    }

    /// Whether a message waits to be read.
    pub(crate) fn has_messages(&self) -> bool {
        let Ok(fd) = self.fd() else { return false };
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as the count says.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & libc::POLLIN != 0 }
    }

    /// Reads messages that are there, once; returns their bytes. The process that sent the
    /// descriptor shares its flags, and could make a read wait at any time: so this one brings its
    /// own.
    fn read_now(&self, fd: &OwnedFd, messages: &mut [[u8; MESSAGE]; BATCH]) -> io::Result<usize> {
        if self.flags_decide.load(Ordering::Relaxed) {
            return read_by_flags(fd, messages);
        }
        let len = size_of_val(messages);
        let part = libc::iovec { iov_base: messages.as_mut_ptr().cast(), iov_len: len };
        // -1, in both halves, stands for the file's own position; a userfaultfd has none.
        let (count, position): (libc::c_ulong, libc::c_long) = (1, -1);
        // SAFETY: the kernel reads one iovec, as the count says, and writes at most its bytes,
        // which are those of the array. Both live, and nobody else uses them, until it returns.
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
            // Nothing was read: this kernel takes no flags with a read of a userfaultfd.
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ESPIPE | libc::ENOSYS) => {
                self.flags_decide.store(true, Ordering::Relaxed);
                read_by_flags(fd, messages)
            }
            _ => Err(error),
        }
    }

    /// Whether the process behind it still has its address space. `address` is any page of it.
    pub fn is_process_alive(&self, address: u64) -> bool {
        let argument = raw::uffdio_writeprotect {
            range: raw::uffdio_range { start: address & !0xfff, len: 4096 },
            mode: 0,
        };
        let result = self.call("look at", address, 4096, |fd| {
            // SAFETY: the request reads this structure. Taking write protection away where there
            // is none changes nothing.
            unsafe { ioctl_with_ref(fd, request::UFFDIO_WRITEPROTECT.into(), &argument) }
        });
        !matches!(result, Err(error) if error.cause() == crate::Cause::ProcessGone)
    }

    /// The descriptor, for as long as the operation needs it.
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

    /// Does something to a range that the kernel may do in parts. `call` returns what the request
    /// returned, and the count in its structure: bytes done, or a negative error.
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
            // A part was done, and EAGAIN hides why not more: the next call tells. Any other
            // count is an error number that the system has reported already, or was not written.
            match u64::try_from(count) {
                Ok(part @ 1..) if part < len - done => done += part,
                _ => return failed(done, error),
            }
        }
    }
}

/// Whether a descriptor is of a file that the kernel has made for itself, as a userfaultfd is: only
/// those are of no type.
fn is_anonymous(fd: &OwnedFd) -> io::Result<bool> {
    Ok(File::from(fd.try_clone()?).metadata()?.mode() & libc::S_IFMT == 0)
}

/// A descriptor that somebody keeps open, as the request functions take it.
struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Reads messages that are there, with nothing but the flags of the descriptor to keep the read
/// from waiting.
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

/// A descriptor of a userfaultfd that is not ready for use.
fn open_fd() -> Result<(OwnedFd, Access), OpenError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => {
            // SAFETY: the request takes flags and makes a descriptor.
            let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as _) };
            if fd >= 0 {
                // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
                return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Access::Device));
            }
            io::Error::last_os_error()
        }
        Err(error) => error,
    };
    // SAFETY: the call takes flags and makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if let Ok(fd @ 0..) = RawFd::try_from(fd) {
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Access::SystemCall));
    }
    let call = io::Error::last_os_error();
    Err(match call.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => OpenError::NotPermitted { device, call },
        Some(libc::ENOSYS) => OpenError::NoKernelSupport(call),
        _ => OpenError::Failed(call),
    })
}

/// The least number of a userfaultfd's descriptor: more than a VMM has descriptors, and less than the
/// limit of open files as a rule.
const HIGH: u64 = 512;

/// Gives a descriptor a high number. The kernel queues the files of a process that ends in the order
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
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        high @ 0.. => unsafe { OwnedFd::from_raw_fd(high) },
        // Too many are open. It works all the same.
        _ => fd,
    }
}

/// Agrees on features; returns those that the kernel has.
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

    /// Who holds a descriptor of the same userfaultfd can make it blocking at any time.
    #[test]
    fn a_read_waits_for_nothing_whatever_the_flags() {
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
            // An older kernel: it is noticed, but for a moment's chance.
            assert!(read.unwrap_err().to_string().contains("blocking"));
            if std::env::var("LAB").is_err() {
                println!("SKIPPED: a read of a userfaultfd that takes flags needs Linux 6.10");
            }
            return;
        }
        assert_eq!(read.unwrap(), 0);
    }

    #[test]
    fn without_a_read_that_takes_flags_those_of_the_descriptor_are_looked_at() {
        let uffd = Userfaultfd::open(Features::GUEST_MEMORY).unwrap();
        uffd.flags_decide.store(true, Ordering::Relaxed);
        assert_eq!(uffd.read(&mut Vec::new()).unwrap(), 0);
        let theirs = uffd.try_clone_fd().unwrap();
        // SAFETY: fcntl with this command touches no memory.
        assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFL, 0) }, 0);
        assert!(uffd.read(&mut Vec::new()).unwrap_err().to_string().contains("blocking"));
    }
}
