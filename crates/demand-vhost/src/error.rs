// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The error of the front-end: the back-end, the operation, and the kind of failure.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use demand_memory::{BackingKind, UnmapError};
use demand_uffd::{OpenError, RangeError, ServiceError};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// An error from connecting to a back-end or using it.
#[derive(Debug)]
pub struct Error {
    socket: PathBuf,
    operation: Operation,
    kind: ErrorKind,
}

impl Error {
    pub(crate) fn new(socket: impl Into<PathBuf>, operation: Operation, kind: ErrorKind) -> Self {
        Error { socket: socket.into(), operation, kind }
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    pub(crate) fn into_kind(self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Error { socket, operation, kind } = self;
        write!(f, "cannot {operation} the vhost-user back-end at {}: {kind}", socket.display())
    }
}

impl std::error::Error for Error {
    // The kind is a part of this error, and of its text.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

/// An operation on a back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    AcknowledgeAddresses,
    BeginPostcopy,
    ChangeRegions,
    ConfirmMemory,
    Connect,
    EnableVring,
    EndPostcopy,
    InsertRegion,
    Listen,
    Negotiate,
    ReadConfig,
    ReadQueueCount,
    ReceiveRequests,
    RemoveRegion,
    SetFeatures,
    SetUpVring,
    SetVringAddresses,
    SetVringBase,
    SetVringCall,
    SetVringKick,
    SetVringSize,
    ShareMemory,
    ShareMissingMemory,
    StopVring,
    UnmapMissing,
    Use,
    Watch,
    WatchConfig,
    WriteConfig,
}

impl fmt::Display for Operation {
    /// Writes the operation up to its object, the back-end, as in "stop a queue of".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::AcknowledgeAddresses => "acknowledge the addresses of",
            Operation::BeginPostcopy => "begin post-copy with",
            Operation::ChangeRegions => "change the memory regions of",
            Operation::ConfirmMemory => "confirm the memory shared with",
            Operation::Connect => "connect to",
            Operation::EnableVring => "enable or disable a queue of",
            Operation::EndPostcopy => "end post-copy with",
            Operation::InsertRegion => "share a further memory region with",
            Operation::Listen => "start listening for faults of",
            Operation::Negotiate => "negotiate features with",
            Operation::ReadConfig => "read the config space of",
            Operation::ReadQueueCount => "read the number of queues of",
            Operation::ReceiveRequests => "receive requests of",
            Operation::RemoveRegion => "take a memory region from",
            Operation::SetFeatures => "set the features of",
            Operation::SetUpVring => "set up a queue of",
            Operation::SetVringAddresses => "set the addresses of a queue of",
            Operation::SetVringBase => "set the next request of a queue of",
            Operation::SetVringCall => "connect the interrupt of a queue of",
            Operation::SetVringKick => "connect the doorbell of a queue of",
            Operation::SetVringSize => "set the size of a queue of",
            Operation::ShareMemory => "share memory with",
            Operation::ShareMissingMemory => "share missing memory with",
            Operation::StopVring => "stop a queue of",
            Operation::UnmapMissing => "unmap missing memory from",
            Operation::Use => "use",
            Operation::Watch => "watch",
            Operation::WatchConfig => "watch the config space of",
            Operation::WriteConfig => "write the config space of",
        })
    }
}

/// Returns the hint for a socket that does not accept a connection.
fn hint_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "let this user write to the socket",
        _ => "start the back-end first, or use the socket that it listens on",
    }
}

/// The kinds of failures of an [`Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The connection to the socket failed.
    #[error("{0}; {hint}", hint = hint_for(.0))]
    Connect(#[source] io::Error),
    /// The path of the socket is longer than a socket's address can hold.
    #[error("its path is longer than a socket's limit of 107 bytes; use a shorter one")]
    PathTooLong,
    /// The back-end does not offer post-copy (PAGEFAULT), and pages are missing.
    #[error(
        "it does not offer PAGEFAULT (protocol feature bit 8, together with bit 3, REPLY_ACK) and \
         would read zeros; use a back-end with post-copy, or fill the memory before the back-end \
         maps it"
    )]
    NoPagefault,
    /// The back-end offers post-copy but sent no userfaultfd.
    #[error("it sent no userfaultfd ({0}); let its user read and write /dev/userfaultfd")]
    NoUserfaultfd(#[source] vhost::Error),
    /// The back-end does not support protocol features at all.
    #[error(
        "it does not offer PROTOCOL_FEATURES (feature bit 30), as all but very old ones do; use \
         one that does"
    )]
    NoProtocolFeatures,
    /// The back-end lacks required protocol features.
    #[error("it does not offer the protocol features {0:?}; use one that does")]
    MissingFeatures(VhostUserProtocolFeatures),
    /// The back-end closed the connection.
    #[error(
        "it closed the connection; check its log: it may serve another front-end, or have failed"
    )]
    Disconnected,
    /// The back-end did not answer in time.
    #[error(
        "no answer within {} seconds, so the connection was closed; check its log and its storage, \
         and start it again if it has failed",
        patience.as_secs_f32()
    )]
    Silent {
        /// The time limit.
        patience: Duration,
    },
    /// The back-end refused, or its answer violated the protocol.
    #[error("{0}; check its log, or use another back-end")]
    Protocol(#[source] vhost::Error),
    /// The back-end returned our address of a region instead of its own.
    #[error(
        "it names our address {address:#x} as its own, as libvhost-user does, so its faults could \
         not be served; use a back-end whose post-copy works"
    )]
    EchoedAddress {
        /// The address.
        address: u64,
    },
    /// The back-end returned an implausible address.
    #[error(
        "it reports a mapping of {len} bytes at {address:#x}, which {why}; this is a bug in the \
         back-end, use another"
    )]
    BadBase {
        /// The address that it returned.
        address: u64,
        /// Length of the region, in bytes.
        len: u64,
        /// The reason.
        why: &'static str,
    },
    /// There are more regions than one message can describe.
    #[error(
        "the memory has {regions} regions, and one message holds at most {most}; use fewer, larger \
         regions"
    )]
    TooManyRegions {
        /// The number of regions.
        regions: usize,
        /// The highest possible number.
        most: usize,
    },
    /// The back-end cannot get or lose a region while the memory is shared.
    #[error(
        "it does not offer CONFIGURE_MEM_SLOTS (protocol feature bit 15), so its memory cannot \
         change; use a back-end that does (vhost-device-blk: --mem-slots on), or connect again, \
         which shares all memory anew"
    )]
    NoMemSlots,
    /// The back-end has as many regions as it can have.
    #[error("it can have at most {most} memory regions, and has them; remove one first")]
    NoSlotLeft {
        /// The highest possible number.
        most: u64,
    },
    /// The region overlaps one that is shared.
    #[error(
        "the region at guest address {address:#x} overlaps the one at {other:#x}, which it has; \
         place the region elsewhere"
    )]
    RegionOverlap {
        /// The region's address.
        address: u64,
        /// The address of the other one.
        other: u64,
    },
    /// No region that is shared begins at the address.
    #[error(
        "it has no region that begins at guest address {address:#x}; use the address at which the \
         region was shared"
    )]
    NoRegion {
        /// The address.
        address: u64,
    },
    /// A region lies beyond the highest possible guest address.
    #[error(
        "the region at guest address {address:#x} is too high: guest addresses have at most 52 \
         bits; choose a lower address"
    )]
    TooHigh {
        /// The region's address.
        address: u64,
    },
    /// The memory cannot be mapped by another process.
    #[error(
        "the region at guest address {address:#x} has no file that the back-end could map; use \
         shared memory or huge pages"
    )]
    NoFile {
        /// The region's address.
        address: u64,
    },
    /// Pages are missing in memory of a kind that no userfaultfd traps.
    #[error(
        "no userfaultfd traps accesses to {kind}, of which {missing} pages are missing at guest \
         address {address:#x}, and it would read zeros; fill the memory before the back-end maps it"
    )]
    Untrappable {
        /// The region's address.
        address: u64,
        /// The kind of memory.
        kind: BackingKind,
        /// Number of missing pages.
        missing: u64,
    },
    /// Pages are missing, but the operation needs complete memory.
    #[error(
        "{missing} pages are still missing and would read as zeros; wait until all are present"
    )]
    Incomplete {
        /// Number of missing pages.
        missing: u64,
    },
    /// The operation is not allowed in the connection's current state.
    #[error("{why}")]
    Order {
        /// The reason, and a hint.
        why: &'static str,
    },
    /// A ring lies outside the shared memory.
    #[error(
        "no shared memory at guest address {address:#x}, where queue {queue} has a ring; the \
         guest's driver, or the device state of a snapshot, is wrong"
    )]
    VringAddress {
        /// The queue's index.
        queue: usize,
        /// The address.
        address: u64,
    },
    /// The config space has more bytes than one message can describe.
    #[error("{len} bytes are more than one message describes; use fewer")]
    ConfigLength {
        /// The number of bytes.
        len: usize,
    },
    /// The back-end's userfaultfd is unusable.
    #[error("{0}")]
    Userfaultfd(#[source] OpenError),
    /// The back-end's mapping cannot be armed.
    #[error("{0}")]
    Arm(#[source] RangeError),
    /// Missing pages that the back-end may have mapped too early could not be unmapped.
    #[error(
        "it touched the memory when it mapped it, and {0}; start it without mlockall and \
         MAP_POPULATE (DPDK's testpmd: --no-mlockall), or fill the memory before the back-end maps \
         it"
    )]
    Prefaulted(#[source] UnmapError),
    /// An error of the fault service.
    #[error("{0}")]
    Service(#[source] ServiceError),
    /// Any other system error.
    #[error("{0}; raise the limit that it names, or free resources")]
    System(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn errors_are_one_line_with_advice() {
        let error = Error::new("s", Operation::ShareMissingMemory, ErrorKind::NoPagefault);
        let text = error.to_string();
        assert!(text.starts_with("cannot share missing memory with the vhost-user back-end at s"));
        assert!(text.contains("PAGEFAULT") && text.contains("fill the memory"), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        let silent = ErrorKind::Silent { patience: Duration::from_millis(1500) };
        let text = Error::new("s", Operation::Negotiate, silent).to_string();
        assert!(
            text.contains("cannot negotiate features with the") && text.contains("1.5 seconds"),
            "{text}"
        );
    }

    #[test]
    fn causes_are_chained() {
        let cause = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        let text = cause.to_string();
        let error = Error::new("s", Operation::Connect, ErrorKind::Connect(cause));
        assert!(error.to_string().contains(&text), "{error}");
        assert_eq!(error.source().expect("it has a cause").to_string(), text);
    }
}
