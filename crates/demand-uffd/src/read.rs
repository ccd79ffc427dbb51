// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the messages of a userfaultfd without ever waiting for one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Event;
use crate::event::{MESSAGE, Message};

/// Number of messages in one read.
pub(crate) const BATCH: usize = 16;

/// The way in which the messages of one userfaultfd are read.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// Whether the kernel lacks reads that never wait by their own flags, so that those of the
    /// descriptor decide.
    flags_decide: AtomicBool,
}

impl Reader {
    /// Reads the available messages, at most a batch, and appends them to `events`. Returns their
    /// number, 0 if there are none.
    pub(crate) fn read(&self, fd: &OwnedFd, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut messages = [[0u8; MESSAGE]; BATCH];
        loop {
            let read = match self.read_now(fd, &mut messages) {
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::Features;
    use crate::open::{Accesses, open};

    fn make_blocking(fd: &OwnedFd) {
        // SAFETY: fcntl with this command touches no memory.
        assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) }, 0);
    }

    /// A process that holds a descriptor of the same userfaultfd can make it blocking at any time.
    #[test]
    fn read_never_blocks_despite_blocking_flags() {
        let uffd =
            Arc::new((Reader::default(), open(Features::GUEST_MEMORY, Accesses::All).unwrap().0));
        assert_eq!(uffd.0.read(&uffd.1, &mut Vec::new()).unwrap(), 0);
        make_blocking(&uffd.1.try_clone().unwrap());
        let (sender, receiver) = mpsc::channel();
        let ours = uffd.clone();
        thread::spawn(move || sender.send(ours.0.read(&ours.1, &mut Vec::new())));
        let read = receiver.recv_timeout(Duration::from_secs(20)).expect("the read returns");
        if uffd.0.flags_decide.load(Ordering::Relaxed) {
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
        let fd = open(Features::GUEST_MEMORY, Accesses::All).unwrap().0;
        let reader = Reader { flags_decide: AtomicBool::new(true) };
        assert_eq!(reader.read(&fd, &mut Vec::new()).unwrap(), 0);
        make_blocking(&fd.try_clone().unwrap());
        let error = reader.read(&fd, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("blocking"), "{error}");
    }
}
