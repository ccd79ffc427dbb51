// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves one front-end's connection, in a separate process.
//!
//! A process can be ended while a queue's thread waits for a page that will never arrive. Closing
//! the userfaultfd instead would let the thread continue over zeros (and write them to the disk),
//! and leaking the thread would keep the dead guest's memory allocated forever.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

use crate::advice;
use crate::child::Parent;
use crate::counters::Counters;
use crate::device::BlkBackend;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::options::DeviceOptions;
use crate::signals::{self, Signals};

/// The time that requests in flight, or a message, may make no progress after the front-end has
/// disconnected.
const GRACE: Duration = Duration::from_secs(1);

/// Accepts the connection that is pending on `listener` and serves it until the front-end
/// disconnects or a signal requests termination. Blocked threads may remain: the caller must end
/// the process without running destructors.
pub(crate) fn serve(
    listener: UnixListener,
    signals: &Signals,
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    options: DeviceOptions,
    parent: &Parent,
) -> Result<()> {
    let local = listener.local_addr().map_err(Error::system("get the socket's address"))?;
    let memory = GuestMemoryAtomic::new(Memory::new());
    let backend = Arc::new(BlkBackend::new(disk, counters, memory.clone(), options));
    let requests = backend.requests();
    let mut daemon =
        VhostUserDaemon::new("vhost-user-blk".into(), backend, memory).map_err(failed)?;
    daemon.start(&mut Listener::from(listener)).map_err(failed)?;
    let connection = accepted(&local)?;
    parent.connected(&connection)?;

    // The thread that handles messages may itself wait for a missing page (SET_VRING_ADDR reads the
    // ring), so it cannot be the thread that watches the connection.
    let (sender, ended) = mpsc::channel();
    thread::Builder::new()
        .name("disconnect".into())
        .spawn(move || {
            let result = daemon.wait();
            // Dropping the daemon would close the userfaultfd, and threads that wait for a page
            // would continue over zeros.
            mem::forget(daemon);
            sender.send(result)
        })
        .map_err(Error::system("spawn a thread"))?;
    let mut end = false;
    while !end {
        let [hung_up, signalled] = signals::poll(
            [(connection.as_raw_fd(), libc::POLLRDHUP), (signals.as_raw_fd(), libc::POLLIN)],
            None,
        )?;
        end = hung_up != 0 || (signalled != 0 && signals.take().end.is_some());
    }

    // Wait for the requests in flight first, then for a message, which may itself be waiting for
    // them.
    let _ = connection.shutdown(std::net::Shutdown::Read);
    let mut patience = GRACE;
    if !requests.stop(GRACE) {
        log::warn!(
            "cannot end a request of the disconnected front-end: it may wait for a missing page; \
             abandoning it"
        );
        patience = Duration::ZERO;
    }
    let result = match ended.recv_timeout(patience) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            log::warn!(
                "cannot end a message of the disconnected front-end: it may wait for a missing \
                 page; abandoning it"
            );
            Ok(())
        }
    };
    match result {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Converts an error of the library into one that tells the user what to do.
fn failed(error: DaemonError) -> Error {
    Error::Connection(match error {
        DaemonError::HandleRequest(VhostUserError::InvalidOperation(
            "postcopy already advised",
        )) => "it sent a second POSTCOPY_ADVISE on one connection, which supports only one \
             post-copy; connect again for another"
            .into(),
        error => {
            let error = error.to_string();
            let advice = advice::for_text(&error).unwrap_or(
                "see the messages above, and check that the front-end uses at most the queue count \
                 and size given here",
            );
            format!("the connection failed ({error}); {advice}")
        }
    })
}

/// Returns a duplicate of the connection that was just accepted, for watching: the library does not
/// expose it. It is the only socket of this process that has our address and is not listening.
fn accepted(local: &std::os::unix::net::SocketAddr) -> Result<UnixStream> {
    let what = "find the front-end's connection";
    for entry in fs::read_dir("/proc/self/fd").map_err(Error::system(what))? {
        let name = entry.map_err(Error::system(what))?.file_name();
        let Some(fd) = name.to_str().and_then(|n| n.parse::<RawFd>().ok()) else {
            continue;
        };
        // SAFETY: duplicating a descriptor has no effect on the original, even if it has been
        // closed meanwhile; the new descriptor has no other owner.
        let stream = unsafe {
            match libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) {
                -1 => continue,
                fd => UnixStream::from(OwnedFd::from_raw_fd(fd)),
            }
        };
        let same = stream.local_addr().is_ok_and(|own| {
            own.as_pathname() == local.as_pathname()
                && own.as_abstract_name() == local.as_abstract_name()
        });
        if same && stream.peer_addr().is_ok() {
            return Ok(stream);
        }
    }
    Err(Error::system(what)(io::ErrorKind::NotFound.into()))
}
