// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong between a front-end and a back-end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use demand_memory::UnmapError;
use demand_uffd::{OpenError, RangeError, ServiceError};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::MAX_REGIONS;

/// Why a back-end could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers on the socket.
    #[error(
        "connect to the vhost-user back-end at {}: {error}; start the back-end first, or name the \
         socket that it listens on",
        socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The back-end cannot page: it has no userfaultfd to offer.
    #[error(
        "share memory that has not arrived with the vhost-user back-end at {}: it does not offer \
         PAGEFAULT (protocol feature bit 8, together with bit 3, REPLY_ACK) and would read zeros; \
         use a back-end with post-copy, or fill the memory before the back-end sees it",
        socket.display()
    )]
    NoPagefault {
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end offers post-copy, and then has no userfaultfd.
    #[error(
        "begin post-copy with the vhost-user back-end at {}: it gave no userfaultfd ({error}); let \
         its user read and write /dev/userfaultfd",
        socket.display()
    )]
    NoUserfaultfd {
        /// The back-end's socket.
        socket: PathBuf,
        /// What its answer came to.
        error: vhost::Error,
    },
    /// The back-end cannot agree on protocol features at all.
    #[error(
        "use the vhost-user back-end at {}: it does not offer PROTOCOL_FEATURES (feature bit 30), \
         as all but very old ones do; use one that does",
        socket.display()
    )]
    NoProtocolFeatures {
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// The back-end lacks protocol features that are needed.
    #[error(
        "use the vhost-user back-end at {}: it does not offer the protocol features {lacking:?}; \
         use one that does",
        socket.display()
    )]
    Features {
        /// The back-end's socket.
        socket: PathBuf,
        /// What it lacks.
        lacking: VhostUserProtocolFeatures,
    },
    /// The back-end hung up.
    #[error(
        "{asked} with the vhost-user back-end at {}: it closed the connection; its log says why, \
         start it again",
        socket.display()
    )]
    Disconnected {
        /// The back-end's socket.
        socket: PathBuf,
        /// What was being done.
        asked: &'static str,
    },
    /// The back-end did not answer in time.
    #[error(
        "{asked} with the vhost-user back-end at {}: no answer within {} seconds, the connection \
         was closed; see what the back-end is doing, and start it again",
        socket.display(),
        patience.as_secs_f32()
    )]
    Silent {
        /// The back-end's socket.
        socket: PathBuf,
        /// What was being done.
        asked: &'static str,
        /// How long it had.
        patience: Duration,
    },
    /// The back-end refused, or answered something else than the protocol says.
    #[error(
        "{asked} with the vhost-user back-end at {}: {error}; its log may say more, and another \
         back-end may do better",
        socket.display()
    )]
    Protocol {
        /// The back-end's socket.
        socket: PathBuf,
        /// What was being done.
        asked: &'static str,
        /// What it came to.
        error: vhost::Error,
    },
    /// The back-end gave our own address back where its own belongs.
    #[error(
        "share memory with the vhost-user back-end at {}: it names our address {address:#x} as \
         its own, as libvhost-user does, so its faults could not be served; use a back-end whose \
         post-copy works",
        socket.display()
    )]
    EchoedAddress {
        /// The back-end's socket.
        socket: PathBuf,
        /// The address.
        address: u64,
    },
    /// The back-end named an address that cannot be right.
    #[error(
        "share memory with the vhost-user back-end at {}: it says that it has {len} bytes mapped \
         at {address:#x}, which {why}; the back-end is at fault, use another",
        socket.display()
    )]
    BadBase {
        /// The back-end's socket.
        socket: PathBuf,
        /// The address that it named.
        address: u64,
        /// Length of the region, in bytes.
        len: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There are more regions than one message can name.
    #[error(
        "share memory of {0} regions with a vhost-user back-end: one message names at most \
         {MAX_REGIONS}; use fewer, larger regions"
    )]
    Regions(usize),
    /// A region lies where no guest's memory can.
    #[error(
        "cannot share the memory at guest address {0:#x}: guest addresses have at most 52 bits; \
         place it lower"
    )]
    TooHigh(u64),
    /// The memory cannot be mapped by another process.
    #[error(
        "share the memory at guest address {0:#x} with a vhost-user back-end: there is no file \
         through which it could map it; use shared memory or huge pages"
    )]
    NoFile(u64),
    /// Pages are missing where none may be.
    #[error(
        "{asked} with the vhost-user back-end at {}: {missing} pages are still missing, and would \
         read as zeros; wait until the last one is present",
        socket.display()
    )]
    Incomplete {
        /// The back-end's socket.
        socket: PathBuf,
        /// What was to be done.
        asked: &'static str,
        /// Number of missing pages.
        missing: u64,
    },
    /// An operation does not fit what was done before.
    #[error("{asked} with the vhost-user back-end at {}: {why}", socket.display())]
    Order {
        /// The back-end's socket.
        socket: PathBuf,
        /// What was to be done.
        asked: &'static str,
        /// Why not now, and what to do.
        why: &'static str,
    },
    /// A ring lies outside guest memory.
    #[error(
        "set up queue {queue}: no shared memory at guest address {address:#x}; the driver, or the \
         snapshot's device state, is at fault"
    )]
    VringAddress {
        /// The queue's index.
        queue: usize,
        /// The address.
        address: u64,
    },
    /// The back-end's userfaultfd cannot be used.
    #[error("begin post-copy with the vhost-user back-end at {}: {error}", socket.display())]
    Userfaultfd {
        /// The back-end's socket.
        socket: PathBuf,
        /// What is wrong with it.
        error: OpenError,
    },
    /// The back-end's mapping cannot be armed.
    #[error("share memory with the vhost-user back-end at {}: {error}", socket.display())]
    Arm {
        /// The back-end's socket.
        socket: PathBuf,
        /// What the system said.
        error: RangeError,
    },
    /// The back-end may have memory mapped that has not arrived.
    #[error(
        "cannot take memory that has not arrived from the vhost-user back-end at {}, which has \
         touched it when it was given it: {error}; start it without mlockall and MAP_POPULATE \
         (DPDK's testpmd: --no-mlockall), or fill the memory before the back-end sees it",
        socket.display()
    )]
    Prefaulted {
        /// The back-end's socket.
        socket: PathBuf,
        /// The cause.
        error: UnmapError,
    },
    /// The fault service refused.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The system refused something else.
    #[error("{asked}: {error}; raise the limit that it names, or free what it counts")]
    System {
        /// What was to be done.
        asked: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_and_say_what_to_do() {
        let socket = PathBuf::from("blk.sock");
        let text = Error::NoPagefault { socket: socket.clone() }.to_string();
        assert!(text.contains("PAGEFAULT") && text.contains("fill the memory"), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        let patience = Duration::from_millis(1500);
        let text = Error::Silent { socket, asked: "agree on features", patience }.to_string();
        assert!(text.contains("agree on features") && text.contains("1.5 seconds"), "{text}");
    }
}
