// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connection with a back-end.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};

use crate::deadline::within;
use crate::requests::Requests;
use crate::share::Sharing;
use crate::{Error, Result};

/// Protocol features that are used where a back-end has them.
const USED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::PAGEFAULT);

/// Queues of a back-end that does not say how many it has.
const DEFAULT_QUEUES: u64 = 1;

/// The largest queue count that a back-end may have before it was asked.
const MAX_QUEUES: u64 = 256;

/// How a back-end is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Protocol features that must be there. Whoever reads the device's configuration from the
    /// back-end needs `CONFIG`.
    pub needed: VhostUserProtocolFeatures,
    /// Protocol features that are left alone, even where they are offered. Without `MQ` the
    /// back-end is not asked for its number of queues: a network card's means pairs of queues with
    /// some back-ends, and queues with others.
    pub unused: VhostUserProtocolFeatures,
    /// How long the back-end may take for an answer. Time in which it waits for missing pages
    /// does not count.
    pub patience: Duration,
}

impl Default for Options {
    /// No further features, and 30 seconds.
    fn default() -> Self {
        let none = VhostUserProtocolFeatures::empty();
        Options { needed: none, unused: none, patience: Duration::from_secs(30) }
    }
}

/// A vhost-user back-end: another process that is a device, and sees guest memory.
///
/// Its methods wait for the back-end's answers on the calling thread. Those of
/// [`set_vring`](Self::set_vring) may depend on missing pages, so no method may be called on a
/// thread that serves faults; the service's threads are others.
///
/// Dropping it closes the connection and ends the service of the back-end's faults, which stay
/// open: a back-end that still runs then waits, and reads no zeros.
///
/// # Examples
///
/// ```no_run
/// use demand_memory::DemandMemory;
/// use demand_uffd::{DEFAULT_THREADS, FaultService};
/// use demand_vhost::{BackEnd, Options, Vring};
/// use std::sync::Arc;
/// use vm_memory::GuestAddress;
/// use vmm_sys_util::eventfd::EventFd;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let memory: DemandMemory = DemandMemory::default();
/// let service = Arc::new(FaultService::start(DEFAULT_THREADS)?);
/// let mut back_end = BackEnd::connect("blk.sock", Options::default())?;
/// back_end.set_features(back_end.features())?;
/// back_end.share_missing_memory(&memory, &service)?;
/// let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
/// let vring = Vring {
///     size: 256,
///     descriptors: GuestAddress(0x1000),
///     available: GuestAddress(0x2000),
///     used: GuestAddress(0x3000),
///     next_available: 0,
///     kick: &kick,
///     call: &call,
/// };
/// back_end.set_vring(0, &vring, true)?;
/// // ... the guest runs, until all pages of its memory are present:
/// back_end.end_postcopy()?;
/// service.finish()?;
/// # Ok(())
/// # }
/// ```
pub struct BackEnd {
    frontend: Frontend,
    stream: Arc<UnixStream>,
    socket: PathBuf,
    options: Options,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues: u64,
    sharing: Sharing,
    requests: Option<Requests>,
}

/// Closes a connection from another thread, which ends the waits of its [`BackEnd`]; and tells
/// that thread whether it is closed, while the `BackEnd` waits.
#[derive(Clone, Debug)]
pub struct HangUp(Arc<UnixStream>);

impl HangUp {
    /// Closes the connection.
    pub fn hang_up(&self) {
        // It fails only if the connection is down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Whether the connection is closed, by whichever side.
    pub fn is_closed(&self) -> bool {
        let events = libc::POLLIN | libc::POLLRDHUP;
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events, revents: 0 };
        // SAFETY: one entry, as the count says.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        let gone = libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR;
        ready > 0 && poll.revents & gone != 0
    }
}

impl AsRawFd for HangUp {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl BackEnd {
    /// Connects to the back-end that listens on `socket` and agrees with it on protocol features.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] if nobody listens, [`Error::Features`] and
    /// [`Error::NoProtocolFeatures`] if it lacks what is needed.
    pub fn connect(socket: impl AsRef<Path>, options: Options) -> Result<Self> {
        let socket = socket.as_ref().to_path_buf();
        let refused = |error| Error::Connect { socket: socket.clone(), error };
        let stream = connect(&socket).map_err(refused)?;
        let ours = Arc::new(stream.try_clone().map_err(refused)?);
        let mut this = BackEnd {
            frontend: Frontend::from_stream(stream, MAX_QUEUES),
            stream: ours,
            socket,
            options,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queues: DEFAULT_QUEUES,
            sharing: Sharing::None,
            requests: None,
        };
        this.in_time("agree on features", Self::negotiate)?;
        Ok(this)
    }

    fn negotiate(&mut self) -> Result<()> {
        const ASKED: &str = "agree on features";
        self.ask(ASKED, |f| f.set_owner())?;
        self.features = self.ask(ASKED, |f| f.get_features())?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::NoProtocolFeatures { socket: self.socket.clone() });
        }
        let needed = self.options.needed;
        let offered = self.ask(ASKED, |f| f.get_protocol_features())?;
        if !offered.contains(needed) {
            return Err(Error::Features {
                socket: self.socket.clone(),
                lacking: needed.difference(offered),
            });
        }
        self.protocol = offered & (USED.difference(self.options.unused) | needed);
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // Its steps must be known to be done, one by one.
            self.protocol.remove(VhostUserProtocolFeatures::PAGEFAULT);
        }
        let agreed = self.protocol;
        self.ask(ASKED, |f| f.set_protocol_features(agreed))?;
        if agreed.contains(VhostUserProtocolFeatures::MQ) {
            self.queues = self.ask("count its queues", |f| f.get_queue_num())?;
        }
        Ok(())
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The virtio features that the back-end offers, as the bits of the device.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features that were agreed on.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Whether memory can be shared with it that has not arrived.
    pub fn has_pagefault(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::PAGEFAULT)
    }

    /// Number of queues that it has; 1 if it does not say.
    pub fn queues(&self) -> u64 {
        self.queues
    }

    /// Accepts those of `features` that the back-end offers; comes before the queues.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        let bits = features & self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        const ASKED: &str = "accept features";
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_features(bits)))
    }

    /// Reads the device's configuration from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's refusals, and [`Error::Protocol`] if it has not offered `CONFIG`.
    pub fn read_config(&mut self, offset: u32, config: &mut [u8]) -> Result<()> {
        let (size, flags) = (config.len() as u32, VhostUserConfigFlags::empty());
        let zeros = vec![0; config.len()];
        let (_, content) = self.in_time("read its configuration", |this| {
            this.ask("read its configuration", |f| f.get_config(offset, size, flags, &zeros))
        })?;
        // The vhost crate has checked that the lengths agree.
        config.copy_from_slice(&content);
        Ok(())
    }

    /// Writes the device's configuration from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's refusals, and [`Error::Protocol`] if it has not offered `CONFIG`.
    pub fn write_config(&mut self, offset: u32, config: &[u8]) -> Result<()> {
        // A driver's write is type 0 to back-ends, and what the vhost crate calls writable is what
        // they take for a migration, and refuse.
        let flags = VhostUserConfigFlags::empty();
        const ASKED: &str = "write its configuration";
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_config(offset, flags, config)))
    }

    /// Whether the back-end is still there. To be told when it goes, watch the
    /// [descriptor](AsRawFd): when it becomes readable, ask.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`].
    pub fn check(&self) -> Result<()> {
        if self.hang_up().is_closed() {
            return Err(self.disconnected("look after the device"));
        }
        Ok(())
    }

    /// Has `changed` called when the back-end says that its configuration is another; false if it
    /// cannot say so. It is called on a thread of its own, on which it must not wait for the
    /// back-end: that may be waiting for its return.
    ///
    /// # Errors
    ///
    /// The back-end's refusals, and the system's if there is no thread to be had.
    pub fn on_config_change(&mut self, changed: impl Fn() + Send + Sync + 'static) -> Result<bool> {
        if !self.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Ok(false);
        }
        const ASKED: &str = "hear of changes of its configuration";
        let system = |error| Error::System { asked: ASKED, error };
        let (requests, theirs) = Requests::serve(changed).map_err(system)?;
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_backend_request_fd(&theirs)))?;
        self.requests = Some(requests);
        Ok(true)
    }

    /// What ends this connection, and every wait for the back-end, from another thread.
    pub fn hang_up(&self) -> HangUp {
        HangUp(self.stream.clone())
    }

    /// Runs something that the back-end has to answer in time, unless it waits for pages.
    pub(crate) fn in_time<T>(
        &mut self,
        asked: &'static str,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let (stream, patience) = (self.stream.clone(), self.options.patience);
        let armed = self.sharing.armed().to_vec();
        let excused = || armed.iter().any(|mapping| mapping.is_waited_for());
        let (result, late) = within(patience, &stream, excused, || work(self))
            .map_err(|error| Error::System { asked: "watch a vhost-user back-end", error })?;
        match result {
            Err(_) if late => Err(Error::Silent { socket: self.socket.clone(), asked, patience }),
            result => result,
        }
    }

    /// Sends a message that has a reply of its own, or none.
    pub(crate) fn ask<T>(
        &mut self,
        asked: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        call(&mut self.frontend).map_err(|error| self.failed(asked, error))
    }

    /// Sends a message that has no reply of its own, and waits until the back-end has dealt with
    /// it. One that cannot acknowledge it answers the next when it has; or hangs up, if it has
    /// failed.
    pub(crate) fn tell<T>(
        &mut self,
        asked: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            let told = self.ask(asked, call)?;
            self.ask(asked, |f| f.get_features())?;
            return Ok(told);
        }
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        call(&mut self.frontend).map_err(|error| self.failed(asked, error))
    }

    fn failed(&self, asked: &'static str, error: vhost::Error) -> Error {
        let broken = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        };
        match &error {
            vhost::Error::VhostUserProtocol(
                ProtocolError::Disconnected | ProtocolError::PartialMessage,
            ) => self.disconnected(asked),
            vhost::Error::VhostUserProtocol(
                ProtocolError::SocketBroken(io) | ProtocolError::SocketError(io),
            ) if broken(io) => self.disconnected(asked),
            _ => Error::Protocol { socket: self.socket.clone(), asked, error },
        }
    }

    pub(crate) fn disconnected(&self, asked: &'static str) -> Error {
        Error::Disconnected { socket: self.socket.clone(), asked }
    }

    pub(crate) fn wrong_order(&self, asked: &'static str, why: &'static str) -> Error {
        Error::Order { socket: self.socket.clone(), asked, why }
    }

    pub(crate) fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    pub(crate) fn set_sharing(&mut self, sharing: Sharing) {
        self.sharing = sharing;
    }
}

/// Connects, and gives a back-end that has just made its socket the time to listen on it.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    for _ in 0..10 {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
    UnixStream::connect(socket)
}

impl AsRawFd for BackEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Whoever may hang up has a descriptor, too.
        self.hang_up().hang_up();
        if let Sharing::Trapped { uffd, service, .. } = &self.sharing {
            service.forget(uffd);
        }
    }
}

impl fmt::Debug for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackEnd")
            .field("socket", &self.socket)
            .field("features", &format_args!("{:#x}", self.features))
            .field("protocol", &self.protocol)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
