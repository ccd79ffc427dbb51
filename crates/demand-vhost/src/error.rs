// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of the vhost-user front-end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use demand_memory::UnmapError;
use demand_uffd::{OpenError, RangeError, ServiceError};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::MAX_REGIONS;

/// An error from connecting to a back-end or using it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection to the socket failed.
    #[error(
        "cannot connect to the vhost-user back-end at {}: {error}; start the back-end first, or \
         use the socket that it listens on",
        socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The back-end does not offer post-copy (PAGEFAULT), and pages are missing.
    #[error(
        "cannot share missing memory with the vhost-user back-end at {}: it does not offer \
         PAGEFAULT (protocol feature bit 8, together with bit 3, REPLY_ACK) and would read zeros; \
         use a back-end with post-copy, or fill the memory before the back-end maps it",
        socket.display()
    )]
    NoPagefault {
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end offers post-copy but sent no userfaultfd.
    #[error(
        "cannot begin post-copy with the vhost-user back-end at {}: it sent no userfaultfd \
         ({error}); let its user read and write /dev/userfaultfd",
        socket.display()
    )]
    NoUserfaultfd {
        /// The back-end's socket.
        socket: PathBuf,
        /// The error from its answer.
        error: vhost::Error,
    },
    /// The back-end does not support protocol features at all.
    #[error(
        "cannot use the vhost-user back-end at {}: it does not offer PROTOCOL_FEATURES (feature \
         bit 30), as all but very old ones do; use one that does",
        socket.display()
    )]
    NoProtocolFeatures {
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end lacks required protocol features.
    #[error(
        "cannot use the vhost-user back-end at {}: it does not offer the protocol features \
         {lacking:?}; use one that does",
        socket.display()
    )]
    Features {
        /// The back-end's socket.
        socket: PathBuf,
        /// The missing features.
        lacking: VhostUserProtocolFeatures,
    },
    /// The back-end closed the connection.
    #[error(
        "cannot {asked} the vhost-user back-end at {}: it closed the connection; check its log, \
         and start it again",
        socket.display()
    )]
    Disconnected {
        /// The back-end's socket.
        socket: PathBuf,
        /// The operation, up to its object, as in "stop a queue of".
        asked: &'static str,
    },
    /// The back-end did not answer in time.
    #[error(
        "cannot {asked} the vhost-user back-end at {}: no answer within {} seconds, so the \
         connection was closed; check its log and its storage, and start it again if it has failed",
        socket.display(),
        patience.as_secs_f32()
    )]
    Silent {
        /// The back-end's socket.
        socket: PathBuf,
        /// The operation.
        asked: &'static str,
        /// The time limit.
        patience: Duration,
    },
    /// The back-end refused, or its answer violated the protocol.
    #[error(
        "cannot {asked} the vhost-user back-end at {}: {error}; check its log, or use another \
         back-end",
        socket.display()
    )]
    Protocol {
        /// The back-end's socket.
        socket: PathBuf,
        /// The operation.
        asked: &'static str,
        /// The error from its answer.
        error: vhost::Error,
    },
    /// The back-end returned our address of a region instead of its own.
    #[error(
        "cannot share memory with the vhost-user back-end at {}: it names our address \
         {address:#x} as its own, as libvhost-user does, so its faults could not be served; use a \
         back-end whose post-copy works",
        socket.display()
    )]
    EchoedAddress {
        /// The back-end's socket.
        socket: PathBuf,
        /// The address.
        address: u64,
    },
    /// The back-end returned an implausible address.
    #[error(
        "cannot share memory with the vhost-user back-end at {}: it reports a mapping of {len} \
         bytes at {address:#x}, which {why}; this is a bug in the back-end, use another",
        socket.display()
    )]
    BadBase {
        /// The back-end's socket.
        socket: PathBuf,
        /// The address that it returned.
        address: u64,
        /// Length of the region, in bytes.
        len: u64,
        /// The reason.
        why: &'static str,
    },
    /// There are more regions than one message can describe.
    #[error(
        "cannot share memory of {0} regions with a vhost-user back-end: one message holds at most \
         {MAX_REGIONS}; use fewer, larger regions"
    )]
    Regions(usize),
    /// A region lies beyond the highest possible guest address.
    #[error(
        "cannot share the memory at guest address {0:#x}: guest addresses have at most 52 bits; \
         choose a lower address"
    )]
    TooHigh(u64),
    /// The memory cannot be mapped by another process.
    #[error(
        "cannot share the memory at guest address {0:#x} with a vhost-user back-end: it has no \
         file that the back-end could map; use shared memory or huge pages"
    )]
    NoFile(u64),
    /// Pages are missing, but the operation needs complete memory.
    #[error(
        "cannot {asked} the vhost-user back-end at {}: {missing} pages are still missing and would \
         read as zeros; wait until all are present",
        socket.display()
    )]
    Incomplete {
        /// The back-end's socket.
        socket: PathBuf,
        /// The operation.
        asked: &'static str,
        /// Number of missing pages.
        missing: u64,
    },
    /// The operation is not allowed in the connection's current state.
    #[error("cannot {asked} the vhost-user back-end at {}: {why}", socket.display())]
    Order {
        /// The back-end's socket.
        socket: PathBuf,
        /// The operation.
        asked: &'static str,
        /// The reason, and a hint.
        why: &'static str,
    },
    /// A ring lies outside the shared memory.
    #[error(
        "cannot set up queue {queue}: no shared memory at guest address {address:#x}; the guest's \
         driver, or the device state of a snapshot, is wrong"
    )]
    VringAddress {
        /// The queue's index.
        queue: usize,
        /// The address.
        address: u64,
    },
    /// The back-end's userfaultfd is unusable.
    #[error("cannot begin post-copy with the vhost-user back-end at {}: {error}", socket.display())]
    Userfaultfd {
        /// The back-end's socket.
        socket: PathBuf,
        /// The cause.
        error: OpenError,
    },
    /// The back-end's mapping cannot be armed.
    #[error("cannot share memory with the vhost-user back-end at {}: {error}", socket.display())]
    Arm {
        /// The back-end's socket.
        socket: PathBuf,
        /// The system's error.
        error: RangeError,
    },
    /// Missing pages that the back-end may have mapped too early could not be unmapped.
    #[error(
        "cannot unmap missing memory that the vhost-user back-end at {} touched when it mapped it: \
         {error}; start it without mlockall and MAP_POPULATE (DPDK's testpmd: --no-mlockall), or \
         fill the memory before the back-end maps it",
        socket.display()
    )]
    Prefaulted {
        /// The back-end's socket.
        socket: PathBuf,
        /// The cause.
        error: UnmapError,
    },
    /// An error of the fault service.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// Any other system error.
    #[error("cannot {asked}: {error}; raise the limit that it names, or free resources")]
    System {
        /// The operation.
        asked: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_with_advice() {
        let socket = PathBuf::from("blk.sock");
        let text = Error::NoPagefault { socket: socket.clone() }.to_string();
        assert!(text.contains("PAGEFAULT") && text.contains("fill the memory"), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        let patience = Duration::from_millis(1500);
        let text = Error::Silent { socket, asked: "negotiate features with", patience }.to_string();
        assert!(
            text.contains("cannot negotiate features with the") && text.contains("1.5 seconds"),
            "{text}"
        );
    }
}
