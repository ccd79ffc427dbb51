// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connection to a vhost-user back-end: its features, its config space, and bounded waits.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};

use crate::connect::{connect, unconnected};
use crate::deadline::within;
use crate::error::Operation;
use crate::requests::Requests;
use crate::sharing::Sharing;
use crate::{Error, ErrorKind, HangUp, Options, Result};

/// Protocol features that are used if the back-end offers them.
const USED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::PAGEFAULT)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Number of queues of a back-end that does not report one.
const DEFAULT_QUEUES: u64 = 1;

/// Maximum queue count, used until the back-end reports its own.
const MAX_QUEUES: u64 = 256;

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
    hang_up: HangUp,
    socket: PathBuf,
    options: Options,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues: u64,
    sharing: Sharing,
    requests: Option<Requests>,
}

impl BackEnd {
    /// Connects to the back-end that listens on `socket` and negotiates protocol features.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Connect`] if no process listens, [`ErrorKind::NoProtocolFeatures`] or
    /// [`ErrorKind::MissingFeatures`] if the back-end lacks required features, and the back-end's
    /// errors; [`ErrorKind::Silent`] if it does not answer in time.
    pub fn connect(socket: impl AsRef<Path>, options: Options) -> Result<Self> {
        Self::connect_with(socket, options, |_| {})
    }

    /// Does the same, and first passes `begun` the handle with which another thread can end the
    /// attempt, and later every wait for the back-end.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect), and [`ErrorKind::Disconnected`] if another thread ends
    /// the attempt.
    pub fn connect_with(
        socket: impl AsRef<Path>,
        options: Options,
        begun: impl FnOnce(&HangUp),
    ) -> Result<Self> {
        let socket = socket.as_ref().to_path_buf();
        let (stream, hang_up) = unconnected(&socket)?;
        begun(&hang_up);
        connect(&stream, &socket, options.patience, &hang_up)?;
        let mut this = BackEnd {
            frontend: Frontend::from_stream(stream, MAX_QUEUES),
            hang_up,
            socket,
            options,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queues: DEFAULT_QUEUES,
            sharing: Sharing::None,
            requests: None,
        };
        this.in_time(Operation::Negotiate, Self::negotiate)?;
        Ok(this)
    }

    fn negotiate(&mut self) -> Result<()> {
        let operation = Operation::Negotiate;
        self.ask(operation, |f| f.set_owner())?;
        self.features = self.ask(operation, |f| f.get_features())?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(self.error(Operation::Use, ErrorKind::NoProtocolFeatures));
        }
        let needed = self.options.needed;
        let offered = self.ask(operation, |f| f.get_protocol_features())?;
        if !offered.contains(needed) {
            let lacking = needed.difference(offered);
            return Err(self.error(Operation::Use, ErrorKind::MissingFeatures(lacking)));
        }
        self.protocol = offered & (USED.difference(self.options.unused) | needed);
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // Post-copy needs an acknowledgement of each step.
            self.protocol.remove(VhostUserProtocolFeatures::PAGEFAULT);
        }
        let agreed = self.protocol;
        self.ask(operation, |f| f.set_protocol_features(agreed))?;
        if agreed.contains(VhostUserProtocolFeatures::MQ) {
            self.queues = self.ask(Operation::ReadQueueCount, |f| f.get_queue_num())?;
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

    /// Checks that memory with missing pages can be shared with the back-end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoPagefault`] if not.
    pub fn expect_pagefault(&self) -> Result<()> {
        if self.protocol.contains(VhostUserProtocolFeatures::PAGEFAULT) {
            return Ok(());
        }
        Err(self.error(Operation::ShareMissingMemory, ErrorKind::NoPagefault))
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
        self.tell_in_time(Operation::SetFeatures, |f| f.set_features(bits))
    }

    /// Reads the device's config space, from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's errors, and [`ErrorKind::Protocol`] if it does not offer `CONFIG`.
    pub fn read_config(&mut self, offset: u32, config: &mut [u8]) -> Result<()> {
        let operation = Operation::ReadConfig;
        let (len, flags) = (config.len(), VhostUserConfigFlags::empty());
        let size = u32::try_from(len)
            .map_err(|_| self.error(operation, ErrorKind::ConfigLength { len }))?;
        let zeros = vec![0; len];
        let (_, content) = self.in_time(operation, |this| {
            this.ask(operation, |f| f.get_config(offset, size, flags, &zeros))
        })?;
        // The vhost crate has checked that the lengths are equal.
        config.copy_from_slice(&content);
        Ok(())
    }

    /// Writes the device's config space, from `offset` (bytes) on.
    ///
    /// # Errors
    ///
    /// The back-end's errors, and [`ErrorKind::Protocol`] if it does not offer `CONFIG`.
    pub fn write_config(&mut self, offset: u32, config: &[u8]) -> Result<()> {
        // Flags 0 mean a write by the driver. With the flag that the vhost crate calls `WRITABLE`,
        // back-ends take the write for a migration and refuse it.
        let flags = VhostUserConfigFlags::empty();
        self.tell_in_time(Operation::WriteConfig, |f| f.set_config(offset, flags, config))
    }

    /// Checks that the back-end has not closed the connection. To notice that, watch the
    /// [descriptor](AsRawFd) and call this method when it becomes readable.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Disconnected`] if it has.
    pub fn check(&self) -> Result<()> {
        self.hang_up.check()
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
        let (requests, theirs) = Requests::serve(changed)
            .map_err(|error| self.error(Operation::ReceiveRequests, ErrorKind::System(error)))?;
        self.tell_in_time(Operation::WatchConfig, |f| f.set_backend_request_fd(&theirs))?;
        self.requests = Some(requests);
        Ok(true)
    }

    /// Returns a handle that closes this connection from another thread, which ends every wait for
    /// the back-end.
    pub fn hang_up(&self) -> HangUp {
        self.hang_up.clone()
    }

    /// Runs `work`, whose messages the back-end must answer in time, except while it waits for
    /// pages.
    pub(crate) fn in_time<T>(
        &mut self,
        operation: Operation,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let (hang_up, patience) = (self.hang_up.clone(), self.options.patience);
        let armed = self.sharing.armed().to_vec();
        let excused = || armed.iter().any(|mapping| mapping.is_waited_for());
        let (result, late) = within(patience, &hang_up, excused, || work(self))
            .map_err(|error| self.error(Operation::Watch, ErrorKind::System(error)))?;
        match result {
            Err(_) if late => Err(self.error(operation, ErrorKind::Silent { patience })),
            result => result,
        }
    }

    /// Sends a message as [`tell`](Self::tell) does, and bounds the wait.
    pub(crate) fn tell_in_time<T>(
        &mut self,
        operation: Operation,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.in_time(operation, |this| this.tell(operation, call))
    }

    /// Sends a message that has its own reply, or none at all.
    pub(crate) fn ask<T>(
        &mut self,
        operation: Operation,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        call(&mut self.frontend).map_err(|error| self.failed(operation, error))
    }

    /// Sends a message that has no reply, and waits until the back-end has processed it. A back-end
    /// without REPLY_ACK cannot acknowledge the message, so this sends a second one that has a
    /// reply: the back-end answers that after it has processed the first, or closes the connection
    /// if the first failed.
    pub(crate) fn tell<T>(
        &mut self,
        operation: Operation,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            let told = self.ask(operation, call)?;
            self.ask(operation, |f| f.get_features())?;
            return Ok(told);
        }
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        call(&mut self.frontend).map_err(|error| self.failed(operation, error))
    }

    fn failed(&self, operation: Operation, error: vhost::Error) -> Error {
        let broken = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        };
        let kind = match error {
            vhost::Error::VhostUserProtocol(
                ProtocolError::Disconnected | ProtocolError::PartialMessage,
            ) => ErrorKind::Disconnected,
            vhost::Error::VhostUserProtocol(
                ProtocolError::SocketBroken(ref io) | ProtocolError::SocketError(ref io),
            ) if broken(io) => ErrorKind::Disconnected,
            error => ErrorKind::Protocol(error),
        };
        self.error(operation, kind)
    }

    /// Returns an error of this connection.
    pub(crate) fn error(&self, operation: Operation, kind: ErrorKind) -> Error {
        Error::new(&self.socket, operation, kind)
    }

    pub(crate) fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    pub(crate) fn sharing_mut(&mut self) -> &mut Sharing {
        &mut self.sharing
    }

    pub(crate) fn set_sharing(&mut self, sharing: Sharing) {
        self.sharing = sharing;
    }
}

impl AsRawFd for BackEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.hang_up.as_raw_fd()
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Each copy of the `HangUp` holds the descriptor too, so dropping ours would not close the
        // connection.
        self.hang_up.hang_up();
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
