// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `BackEnd`, the connection to a vhost-user back-end.

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

/// Protocol features that are used if the back-end offers them.
const USED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::PAGEFAULT);

/// Number of queues of a back-end that does not report one.
const DEFAULT_QUEUES: u64 = 1;

/// Maximum queue count, used until the back-end reports its own.
const MAX_QUEUES: u64 = 256;

/// Options of a connection to a back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Required protocol features. Reading the device's configuration from the back-end needs
    /// `CONFIG`.
    pub needed: VhostUserProtocolFeatures,
    /// Protocol features that are not used even if they are offered. Without `MQ` the back-end is
    /// not asked for its number of queues; for network cards some back-ends count queue pairs,
    /// others queues.
    pub unused: VhostUserProtocolFeatures,
    /// Time limit for an answer of the back-end. Time in which it waits for missing pages does not
    /// count.
    pub patience: Duration,
}

impl Default for Options {
    /// Returns options without required or unused features, and a time limit of 30 seconds.
    fn default() -> Self {
        let none = VhostUserProtocolFeatures::empty();
        Options { needed: none, unused: none, patience: Duration::from_secs(30) }
    }
}

/// A connection to a vhost-user back-end: another process that emulates a device and accesses guest
/// memory.
///
/// The methods wait for the back-end's answers on the calling thread. The answers to
/// [`set_vring`](Self::set_vring) may depend on missing pages, so do not call any method on a
/// thread that serves faults. The fault service uses other threads.
///
/// Dropping it closes the connection and stops serving the back-end's faults. The faults stay open:
/// a back-end that still runs waits, and does not read zeros.
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

/// A handle that closes a connection from another thread, which ends all waits of its [`BackEnd`].
/// It can also check whether the connection is closed while the `BackEnd` waits.
#[derive(Clone, Debug)]
pub struct HangUp(Arc<UnixStream>);

impl HangUp {
    /// Closes the connection.
    pub fn hang_up(&self) {
        // It fails only if the connection is down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Returns whether either side has closed the connection.
    pub fn is_closed(&self) -> bool {
        let events = libc::POLLIN | libc::POLLRDHUP;
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events, revents: 0 };
        // SAFETY: the pointer and the count describe one valid entry.
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
    /// Connects to the back-end that listens on `socket` and negotiates protocol features.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] if no process listens, [`Error::NoProtocolFeatures`] or
    /// [`Error::Features`] if the back-end lacks required features, and the back-end's errors.
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
        this.in_time("negotiate features with", Self::negotiate)?;
        Ok(this)
    }

    fn negotiate(&mut self) -> Result<()> {
        const ASKED: &str = "negotiate features with";
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
            // Post-copy needs an acknowledgement of each step.
            self.protocol.remove(VhostUserProtocolFeatures::PAGEFAULT);
        }
        let agreed = self.protocol;
        self.ask(ASKED, |f| f.set_protocol_features(agreed))?;
        if agreed.contains(VhostUserProtocolFeatures::MQ) {
            self.queues = self.ask("read the number of queues of", |f| f.get_queue_num())?;
        }
        Ok(())
    }

    /// Returns the path of the back-end's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the device's virtio feature bits that the back-end offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Returns the negotiated protocol features.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Returns whether memory with missing pages can be shared with the back-end.
    pub fn has_pagefault(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::PAGEFAULT)
    }

    /// Returns the back-end's number of queues, or 1 if it does not report one.
    pub fn queues(&self) -> u64 {
        self.queues
    }

    /// Acknowledges those of `features` that the back-end offers. Call it before setting up queues.
    ///
    /// # Errors
    ///
    /// The back-end's errors.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        let bits = features & self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        const ASKED: &str = "set the features of";
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_features(bits)))
    }

    /// Reads the device's config space, from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's errors, and [`Error::Protocol`] if it does not offer `CONFIG`.
    pub fn read_config(&mut self, offset: u32, config: &mut [u8]) -> Result<()> {
        let (size, flags) = (config.len() as u32, VhostUserConfigFlags::empty());
        let zeros = vec![0; config.len()];
        let (_, content) = self.in_time("read the config space of", |this| {
            this.ask("read the config space of", |f| f.get_config(offset, size, flags, &zeros))
        })?;
        // The vhost crate has checked that the lengths are equal.
        config.copy_from_slice(&content);
        Ok(())
    }

    /// Writes the device's config space, from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's errors, and [`Error::Protocol`] if it does not offer `CONFIG`.
    pub fn write_config(&mut self, offset: u32, config: &[u8]) -> Result<()> {
        // Flags 0 mean a write by the driver. With the flag that the vhost crate calls `WRITABLE`,
        // back-ends take the write for a migration and refuse it.
        let flags = VhostUserConfigFlags::empty();
        const ASKED: &str = "write the config space of";
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_config(offset, flags, config)))
    }

    /// Checks that the back-end has not closed the connection. To notice that, watch the
    /// [descriptor](AsRawFd) and call this method when it becomes readable.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`] if it has.
    pub fn check(&self) -> Result<()> {
        if self.hang_up().is_closed() {
            return Err(self.disconnected("use"));
        }
        Ok(())
    }

    /// Arranges for `changed` to be called when the back-end reports a change of its config space;
    /// returns `false` if the back-end cannot report changes. `changed` is called on a separate
    /// thread and must not wait for the back-end there, which may itself be waiting for `changed`
    /// to return.
    ///
    /// # Errors
    ///
    /// The back-end's errors, and the system's error if a thread cannot be started.
    pub fn on_config_change(&mut self, changed: impl Fn() + Send + Sync + 'static) -> Result<bool> {
        if !self.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Ok(false);
        }
        const ASKED: &str = "watch the config space of";
        let asked = "receive requests of a vhost-user back-end";
        let system = |error| Error::System { asked, error };
        let (requests, theirs) = Requests::serve(changed).map_err(system)?;
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_backend_request_fd(&theirs)))?;
        self.requests = Some(requests);
        Ok(true)
    }

    /// Returns a handle that closes this connection from another thread, which ends every wait for
    /// the back-end.
    pub fn hang_up(&self) -> HangUp {
        HangUp(self.stream.clone())
    }

    /// Runs `work`, whose messages the back-end must answer in time, except while it waits for
    /// pages.
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

    /// Sends a message that has its own reply, or none at all.
    pub(crate) fn ask<T>(
        &mut self,
        asked: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        call(&mut self.frontend).map_err(|error| self.failed(asked, error))
    }

    /// Sends a message that has no reply, and waits until the back-end has processed it. A back-end
    /// without REPLY_ACK cannot acknowledge the message, so this sends a second one that has a
    /// reply: the back-end answers that after it has processed the first, or closes the connection
    /// if the first failed.
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

/// Connects, and retries for a short time if the back-end has created its socket but does not
/// listen on it yet.
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
        // Each `HangUp` holds a descriptor too, so dropping ours would not close the connection.
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
