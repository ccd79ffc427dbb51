// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that serves a front-end.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::error::{Error, Result};
use crate::relay::{receive, send};

/// The exit status of a process in which a thread panicked.
const PANICKED: i32 = 70;

/// A process that serves one front-end.
pub(crate) struct Child {
    pid: libc::pid_t,
    /// The channel on which it passes its connection and then reports a failure; hung up when the
    /// process ends.
    channel: UnixStream,
    /// The beginning of its report.
    report: Vec<u8>,
}

/// An event of a child.
pub(crate) enum Event {
    /// It accepted this connection.
    Connected(UnixStream),
    /// It ends or has ended.
    Ended,
}

/// The channel to the daemon, in the child.
pub(crate) struct Parent(UnixStream);

impl Parent {
    /// Passes the daemon a descriptor of the connection, which it watches.
    pub(crate) fn connected(&self, connection: &UnixStream) -> Result<()> {
        let failed = Error::system("pass on the connection");
        let copy: OwnedFd = connection.try_clone().map_err(&failed)?.into();
        send(&self.0, &[1], &[copy]).map_err(failed)
    }
}

impl Child {
    /// Runs `work` in a new process, which ends after it, and at the latest together with this one.
    ///
    /// The caller must have no other threads.
    pub(crate) fn fork(work: impl FnOnce(&Parent) -> Result<()>) -> Result<Self> {
        let (channel, theirs) =
            UnixStream::pair().map_err(Error::system("create a socket pair"))?;
        let parent = std::process::id();
        // SAFETY: this process has no other threads: `serve` has checked that, and neither it nor
        // the functions it calls start one. So the child may do everything that this process could.
        match unsafe { libc::fork() } {
            -1 => Err(Error::last_os("start a process for the front-end")),
            0 => {
                drop(channel);
                die_with(parent);
                let print = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |info| {
                    print(info);
                    exit_now(PANICKED);
                }));
                let mut theirs = Parent(theirs);
                match work(&theirs) {
                    Ok(()) => exit_now(0),
                    Err(error) => {
                        let text = match error {
                            Error::Connection(text) => text,
                            error => error.to_string(),
                        };
                        let _ = theirs.0.write_all(text.as_bytes());
                        exit_now(1)
                    }
                }
            }
            pid => Ok(Child { pid, channel, report: vec![] }),
        }
    }

    /// Returns the descriptor that becomes readable at the child's next event.
    pub(crate) fn channel(&self) -> RawFd {
        self.channel.as_raw_fd()
    }

    /// Waits for the child's next event.
    pub(crate) fn next_event(&mut self) -> Result<Event> {
        let mut byte = [0];
        let (n, descriptors) = receive(&self.channel, &mut byte)
            .map_err(Error::system("receive from the front-end's process"))?;
        match descriptors.into_iter().next() {
            Some(connection) => Ok(Event::Connected(connection.into())),
            None => {
                self.report.extend(&byte[..n]);
                Ok(Event::Ended)
            }
        }
    }

    pub(crate) fn kill(&self, signal: libc::c_int) {
        // SAFETY: the process has not been waited for, so its ID has not been reused.
        unsafe { libc::kill(self.pid, signal) };
    }

    /// Waits for the process to end, and returns its outcome.
    ///
    /// # Errors
    /// The outer one if the process cannot be waited for, the inner one if its connection failed.
    pub(crate) fn reap(mut self) -> Result<Result<()>> {
        let _ = self.channel.read_to_end(&mut self.report);
        let text = String::from_utf8_lossy(&self.report).into_owned();
        let mut status = 0;
        // SAFETY: the process is our child, and no other code waits for it.
        while unsafe { libc::waitpid(self.pid, &mut status, 0) } < 0 {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(Error::last_os("wait for the front-end's process"));
            }
        }
        Ok(if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            Err(Error::Connection(format!(
                "its process was killed by signal {signal}; check whether its shared memory was \
                 truncated"
            )))
        } else if !text.is_empty() {
            Err(Error::Connection(text))
        } else {
            match libc::WEXITSTATUS(status) {
                0 => Ok(()),
                status => Err(Error::Connection(format!(
                    "its process ended with status {status}; see the messages above, and report \
                     this bug"
                ))),
            }
        })
    }
}

/// Arranges for the kernel to kill this process when `parent` ends.
fn die_with(parent: u32) {
    // SAFETY: neither call accesses memory.
    let orphan = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid() as u32 != parent
    };
    if orphan {
        exit_now(1);
    }
}

/// Ends the process whatever its threads are doing, and runs no destructor or exit handler.
fn exit_now(status: i32) -> ! {
    // SAFETY: it never returns, and no state of this process is needed afterwards.
    unsafe { libc::_exit(status) }
}
