// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon: listens on a socket and forks a process for each front-end, one at a time.

use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::args::Postcopy;
use crate::counters::Counters;
use crate::device::DeviceOptions;
use crate::disk::{Disk, DiskOptions};
use crate::signals::{self, Signals};
use crate::{Error, Result, connection, postcopy};

/// The time that a front-end's process may take to end after SIGTERM before it is killed. Longer
/// than the time that the process gives its requests in flight.
const END_PATIENCE: Duration = Duration::from_secs(4);

/// The exit status of a front-end's process in which a thread panicked.
const PANICKED: i32 = 70;

/// Configuration of the daemon; [`crate::args::Args::into_options`] creates it from a command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// The Unix socket to listen on.
    pub socket: PathBuf,
    /// The raw image or block device to serve.
    pub disk: PathBuf,
    /// The number of queues, 1 to 64.
    pub num_queues: u16,
    /// The maximum queue size, in descriptors; a power of two.
    pub queue_size: u16,
    /// The maximum number of requests of one queue that are executed at once.
    pub threads: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The logical block size in bytes, if different from the disk's own.
    pub block_size: Option<u32>,
    /// Whether the space of discarded ranges stays allocated.
    pub keep_space: bool,
    /// Whether the write cache is on at the start.
    pub write_cache: bool,
    /// The serial number, up to 20 bytes.
    pub serial: String,
    /// Whether to offer post-copy.
    pub postcopy: Postcopy,
    /// Whether to offer `CONFIGURE_MEM_SLOTS`.
    pub mem_slots: bool,
    /// Whether to return after the first front-end.
    pub once: bool,
    /// The file for the counters.
    pub stats: Option<PathBuf>,
}

/// Serves `options.disk` on `options.socket`: until the first front-end has disconnected if
/// `options.once`, otherwise until SIGTERM or SIGINT. Removes the socket before it returns.
///
/// Blocks the two signals and forks for each front-end, so the process must have no other threads.
/// Front-ends are served one at a time; the next one waits for its turn.
///
/// # Errors
/// [`Error`]; a connection's own errors only with `options.once`.
pub fn serve(options: &Options) -> Result<()> {
    expect_no_threads()?;
    let signals = Signals::block()?;
    let disk_options = DiskOptions {
        read_only: options.read_only,
        block_size: options.block_size,
        keep_space: options.keep_space,
    };
    let disk = Arc::new(Disk::open(&options.disk, &disk_options)?);
    let postcopy = offer_postcopy(options.postcopy)?;
    let counters = Arc::new(Counters::new(options.num_queues)?);
    let write_stats = || match &options.stats {
        Some(path) => counters
            .snapshot()
            .write(path)
            .map_err(|source| Error::Stats { path: path.clone(), source }),
        None => Ok(()),
    };
    write_stats()?;
    let socket = Socket::bind(&options.socket)?;
    let device = DeviceOptions {
        num_queues: options.num_queues,
        queue_size: options.queue_size,
        threads: options.threads,
        write_cache: options.write_cache,
        serial: options.serial.clone(),
        postcopy,
        mem_slots: options.mem_slots,
    };

    loop {
        let [incoming, signalled] = signals::poll(
            [(socket.listener.as_raw_fd(), libc::POLLIN), (signals.as_raw_fd(), libc::POLLIN)],
            None,
        )?;
        if signalled != 0 && signals.take() {
            return write_stats();
        }
        if incoming == 0 {
            continue;
        }
        counters.connected();
        let child = Child::fork(|| {
            // SAFETY: this runs in the child, which drops nothing, so the descriptor has one owner
            // there. It is closed as soon as the connection is accepted, so that no front-end
            // connects to a daemon that has ended.
            let listener = unsafe { UnixListener::from_raw_fd(socket.listener.as_raw_fd()) };
            connection::serve(listener, &signals, disk.clone(), counters.clone(), device.clone())
        })?;
        let (result, ended) = child.wait(&signals)?;
        if ended {
            return write_stats();
        }
        match write_stats() {
            Err(e) if options.once => return Err(e),
            // A failure to write counters does not justify refusing the next front-end.
            Err(e) => log::error!("{e}"),
            Ok(()) => {}
        }
        match result {
            Err(e) if options.once => return Err(e),
            Err(e) => log::error!("{e}"),
            Ok(()) if options.once => return Ok(()),
            Ok(()) => {}
        }
    }
}

/// Fails if the process has other threads: hardly anything is allowed in a forked child of a
/// process with several threads, because locks that the others hold stay locked.
fn expect_no_threads() -> Result<()> {
    let threads = fs::read_dir("/proc/self/task").map_err(Error::system("count threads"))?;
    match threads.count() {
        1 => Ok(()),
        count => Err(Error::Threads(count)),
    }
}

fn offer_postcopy(wish: Postcopy) -> Result<bool> {
    if wish == Postcopy::Off {
        return Ok(false);
    }
    match postcopy::probe() {
        Ok(()) => Ok(true),
        Err(e) if wish == Postcopy::Require => Err(Error::PostcopyUnavailable(e)),
        Err(e) => {
            log::warn!(
                "cannot offer PAGEFAULT (--postcopy on): {e}; {}, or use --postcopy off",
                e.advice()
            );
            Ok(false)
        }
    }
}

/// A process that serves one front-end.
struct Child {
    pid: libc::pid_t,
    /// The read end of the pipe on which it reports a failure; hung up when the process ends.
    report: PipeReader,
}

impl Child {
    /// Runs `work` in a new process, which ends after it, and at the latest together with this one.
    fn fork(work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (report, mut failure) = io::pipe().map_err(Error::system("create a pipe"))?;
        let parent = std::process::id();
        // SAFETY: this process has no other threads: `serve` has checked that, and neither it nor
        // the functions it calls start one. So the child may do everything that this process could.
        match unsafe { libc::fork() } {
            -1 => Err(Error::last_os("start a process for the front-end")),
            0 => {
                drop(report);
                die_with(parent);
                let print = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |info| {
                    print(info);
                    exit_now(PANICKED);
                }));
                match work() {
                    Ok(()) => exit_now(0),
                    Err(e) => {
                        let text = match e {
                            Error::Connection(text) => text,
                            e => e.to_string(),
                        };
                        let _ = failure.write_all(text.as_bytes());
                        exit_now(1)
                    }
                }
            }
            pid => Ok(Child { pid, report }),
        }
    }

    /// Waits for the process to end, and terminates it if this process receives a signal. Returns
    /// the outcome, and whether a signal was received.
    fn wait(mut self, signals: &Signals) -> Result<(Result<()>, bool)> {
        let mut deadline = None;
        loop {
            let patience = deadline.map(|d: Instant| d.saturating_duration_since(Instant::now()));
            let [ended, signalled] = signals::poll(
                [(self.report.as_raw_fd(), libc::POLLIN), (signals.as_raw_fd(), libc::POLLIN)],
                patience,
            )?;
            if signalled != 0 && signals.take() && deadline.is_none() {
                self.kill(libc::SIGTERM);
                deadline = Some(Instant::now() + END_PATIENCE);
            }
            if ended != 0 {
                break;
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                log::warn!("cannot end the front-end's process: it does not stop; killing it");
                self.kill(libc::SIGKILL);
                break;
            }
        }
        let mut text = String::new();
        let _ = self.report.read_to_string(&mut text);
        let mut status = 0;
        // SAFETY: the process is our child, and no other code waits for it.
        while unsafe { libc::waitpid(self.pid, &mut status, 0) } < 0 {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(Error::last_os("wait for the front-end's process"));
            }
        }
        let result = if libc::WIFSIGNALED(status) {
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
        };
        Ok((result, deadline.is_some()))
    }

    fn kill(&self, signal: libc::c_int) {
        // SAFETY: the process has not been waited for, so its ID has not been reused.
        unsafe { libc::kill(self.pid, signal) };
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

/// The socket that front-ends connect to; removed when dropped.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only the socket created here is removed.
    id: (u64, u64),
}

impl Socket {
    /// Listens on `path`, replacing a stale socket.
    fn bind(path: &Path) -> Result<Self> {
        let failed =
            |problem: String, advice| Error::Socket { path: path.to_path_buf(), problem, advice };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(failed("it exists and is not a socket".into(), "use another path"));
            }
            Ok(_) => {
                // Connect with a socket of another type: a live listener does not notice.
                match UnixDatagram::unbound().and_then(|s| s.connect(path)) {
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                        fs::remove_file(path)
                            .map_err(|e| failed(e.to_string(), "remove the stale socket"))?;
                    }
                    Err(e) if e.raw_os_error() != Some(libc::EPROTOTYPE) => {
                        return Err(failed(e.to_string(), "use another path"));
                    }
                    _ => {
                        return Err(failed(
                            "another process listens on it".into(),
                            "use another path",
                        ));
                    }
                }
            }
            Err(_) => {}
        }
        let advice = "use a path of at most 107 bytes, in a directory that this user may write";
        let listener = UnixListener::bind(path).map_err(|e| {
            let too_many = Error::too_many_files("--socket", path, &e);
            too_many.unwrap_or_else(|| failed(e.to_string(), advice))
        })?;
        let made = fs::symlink_metadata(path).map_err(|e| failed(e.to_string(), advice))?;
        Ok(Socket { listener, path: path.to_path_buf(), id: (made.dev(), made.ino()) })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_refused() {
        use clap::Parser;
        let dir = tempfile::tempdir().unwrap();
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("s"));
        fs::write(&disk, [0; 4096]).unwrap();
        let paths = [disk, socket].map(|path| path.display().to_string());
        let args = ["vhost-device-blk", "--disk", &paths[0], "--socket", &paths[1]];
        let options = crate::args::Args::try_parse_from(args).unwrap().into_options().unwrap();
        // On a separate thread, so that a server that starts by mistake does not block the test.
        let (sender, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(serve(&options)));
        let result = result.recv_timeout(Duration::from_secs(10)).expect("it does not begin");
        assert!(matches!(result, Err(Error::Threads(2..))), "{result:?}");
    }

    #[test]
    fn sockets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path).expect("a stale socket is replaced");
        let e = Socket::bind(&path).err().expect("a live one is not");
        assert!(e.to_string().contains("another process listens"), "{e}");
        drop(socket);
        assert!(!path.exists());

        fs::write(&path, "").unwrap();
        assert!(Socket::bind(&path).is_err());
        assert!(path.exists());
        assert!(Socket::bind(&dir.path().join("absent/s")).is_err());
    }
}
