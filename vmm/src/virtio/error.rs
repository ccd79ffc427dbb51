// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors of virtio devices.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use demand_memory::FetchError;
use demand_vhost::Error as BackEndError;
use vm_memory::GuestMemoryError;

use crate::config::device_kind::DeviceKind;
use crate::error::{Error, Kind};

/// An error of a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device or its back-end cannot do what was asked.
    #[error("device {name}: {source}")]
    Fault {
        /// The device's name.
        name: String,
        /// The cause.
        source: DeviceFault,
    },
    /// The host has no more eventfds.
    #[error("cannot create an eventfd: {0}; raise the limit of open files (ulimit -n)")]
    EventFd(#[source] io::Error),
    /// KVM does not take the device's interrupt.
    #[error(
        "cannot connect device {name} to interrupt {gsi} of the guest: {source}; KVM must have an \
         interrupt controller (KVM_CREATE_IRQCHIP)"
    )]
    Interrupt {
        /// The device's name.
        name: String,
        /// The interrupt.
        gsi: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let kind = match error {
            DeviceError::Fault { .. } => Kind::Failed,
            DeviceError::EventFd(_) | DeviceError::Interrupt { .. } => Kind::Host,
        };
        Error::of(kind, error)
    }
}

/// The reason for which a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFault {
    /// The back-end refuses or is gone.
    #[error(transparent)]
    BackEnd(#[from] BackEndError),
    /// The back-end cannot wait for missing pages.
    #[error(
        "{0}; its log says what keeps it from post-copy; lazy=fill fills memory before the back-end \
         sees it, and --lazy off before anyone does"
    )]
    Postcopy(#[source] BackEndError),
    /// The back-end must not wait for missing pages.
    #[error(
        "cannot start it: pages are missing, and lazy=refuse forbids its back-end to wait for \
         them; use lazy=auto or lazy=fill"
    )]
    PagesMissing,
    /// The back-end does not offer what the device needs.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// The option names another kind of device than the snapshot's.
    #[error(
        "it was of kind {saved}, and the option names {wanted}; give the devices in their original \
         order"
    )]
    Kind {
        /// The kind in the snapshot.
        saved: DeviceKind,
        /// The kind in the option.
        wanted: DeviceKind,
    },
    /// The back-end cannot continue from the state in the snapshot.
    #[error(transparent)]
    State(#[from] DeviceStateError),
    /// The device cannot be quiesced.
    #[error("cannot snapshot it: {0}")]
    Quiesce(#[source] QueueError),
    /// The device cannot be started again.
    #[error("cannot resume it: {0}")]
    Resume(#[source] QueueError),
}

/// The reason for which a back-end cannot serve a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NegotiationError {
    /// The back-end knows only legacy drivers.
    #[error(
        "the back-end at {} does not offer VERSION_1 (feature bit 32); use one that does",
        socket.display()
    )]
    NoVersion1 {
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end has fewer queues than the device needs.
    #[error(
        "it needs {needed} queues, and the back-end at {} has {has}; start the back-end with more \
         queues, or lower queues=",
        socket.display()
    )]
    FewQueues {
        /// The number of queues that the device needs.
        needed: u64,
        /// The back-end's socket.
        socket: PathBuf,
        /// The number of queues that the back-end has.
        has: u64,
    },
    /// The back-end offers one queue, and the device needs several.
    #[error(
        "it needs {needed} queues, and the back-end at {} offers only one (no feature MQ); start \
         the back-end with more queues, or use queues=1",
        socket.display()
    )]
    OneQueue {
        /// The number of queues that the device needs.
        needed: u64,
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end has no post-copy.
    #[error("lazy=postcopy: {0}")]
    NoPostcopy(#[source] BackEndError),
    /// The config space cannot be read.
    #[error(transparent)]
    Config(BackEndError),
    /// The back-end gives the guest another CID than the option.
    #[error(
        "cid={wanted}: the back-end at {} gives the guest the CID {theirs}; leave cid= out, or \
         start the back-end with the same CID",
        socket.display()
    )]
    Cid {
        /// The CID in the option.
        wanted: u64,
        /// The back-end's socket.
        socket: PathBuf,
        /// The back-end's CID.
        theirs: u64,
    },
    /// Neither the option nor the back-end states the guest's CID.
    #[error(
        "cannot read the guest's CID from the back-end at {}; give the one that it was started \
         with, as in cid=3",
        socket.display()
    )]
    NoCid {
        /// The back-end's socket.
        socket: PathBuf,
    },
}

/// The reason for which a device cannot continue from its state in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// No device of this kind has such a state.
    #[error(
        "its state in the snapshot does not fit a device of kind {kind}; the snapshot is damaged, \
         use another"
    )]
    Damaged {
        /// The kind.
        kind: DeviceKind,
    },
    /// The new back-end lacks features that the guest uses.
    #[error(
        "the guest uses features that the new back-end does not offer: {lacking}; start one that \
         offers them"
    )]
    Features {
        /// The features' names.
        lacking: String,
    },
    /// A field of the config space that cannot change has another value.
    #[error(
        "the guest has {name} {before}, the new back-end has {now}; start it with the options of \
         the old one"
    )]
    Field {
        /// The field's name.
        name: &'static str,
        /// The value that the guest has read.
        before: String,
        /// The new back-end's value.
        now: String,
    },
}

/// An error from starting or stopping a device's queues.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The back-end has no memory.
    #[error("no memory was shared with its back-end")]
    NoMemory,
    /// The driver starts the device too early.
    #[error("the driver has not agreed on features (status bit FEATURES_OK)")]
    NoFeatures,
    /// The driver has set a queue up wrongly.
    #[error("queue {index}: {source}")]
    Rings {
        /// The queue.
        index: usize,
        /// The fault.
        source: RingError,
    },
    /// The snapshot's queue cannot have been set up by the driver.
    #[error("queue {index}: {source}; the snapshot is damaged, use another")]
    SavedRings {
        /// The queue.
        index: usize,
        /// The fault.
        source: RingError,
    },
    /// The back-end refuses or is gone.
    #[error(transparent)]
    BackEnd(#[from] BackEndError),
    /// The back-end does not answer its requests in flight.
    #[error(
        "queue {index} has requests in flight: taken up to index {taken}, answered up to {used} \
         within {} ms; retry when it is idle, or use a back-end that answers what it takes",
        within.as_millis()
    )]
    InFlight {
        /// The queue.
        index: usize,
        /// Index of the first request that the back-end has not taken.
        taken: u16,
        /// Index of the first request that the back-end has not answered.
        used: u16,
        /// The time limit.
        within: Duration,
    },
    /// The page of a ring cannot be fetched.
    #[error("cannot read a ring: {0}")]
    Fetch(#[from] FetchError),
    /// The page of a ring does not arrive.
    #[error(
        "cannot read a ring: its page at {address:#x} did not arrive within {} ms; check the page \
         source",
        within.as_millis()
    )]
    Late {
        /// Guest physical address of the ring's index.
        address: u64,
        /// The time limit.
        within: Duration,
    },
    /// A ring is not in memory.
    #[error("cannot read a ring: {0}")]
    Read(#[source] GuestMemoryError),
}

/// The fault of a queue's rings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is invalid.
    #[error("{size} descriptors are not a power of two")]
    Size {
        /// The number of descriptors.
        size: u16,
    },
    /// A ring is not aligned.
    #[error("its {ring} at {address:#x} is not aligned to {alignment}")]
    Alignment {
        /// The ring's name.
        ring: &'static str,
        /// Its guest physical address.
        address: u64,
        /// Its alignment, in bytes.
        alignment: u64,
    },
    /// A ring is outside of memory.
    #[error("its {len} bytes at {address:#x} are outside of guest memory")]
    Outside {
        /// The ring's length, in bytes.
        len: u64,
        /// Its guest physical address.
        address: u64,
    },
}
