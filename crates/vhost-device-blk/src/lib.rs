// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user-blk back-end with post-copy.
//!
//! The device serves a raw image or a block device to any vhost-user front-end. It supports
//! `VHOST_USER_PROTOCOL_F_PAGEFAULT`: guest memory may still be missing when the front-end starts
//! the rings; the device's accesses then fault, and the front-end resolves them.
//!
//! Two rules make that safe:
//!
//! * **No lock is held across a fault that another request needs.** Requests are executed by
//!   threads that do not wait for each other, and each thread touches the buffers from user mode
//!   before it passes them to a system call, so that no kernel lock (above all the image's inode
//!   lock) is ever held while a thread waits for a page.
//! * **A page that never arrives is never read as zeros.** Each front-end is served by a separate
//!   process. If the front-end disconnects while a queue waits for a page, that process ends with
//!   the access unfinished, and the next front-end gets a new process.
//!
//! [`serve`] is the whole daemon; [`BlkBackend`] is the device alone, for a program that runs its
//! own `vhost_user_backend::VhostUserDaemon`.

#![cfg_attr(
    test,
    allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")
)]

#[cfg(not(target_os = "linux"))]
compile_error!("vhost-device-blk needs Linux");

mod advice;
mod child;
mod config;
mod connection;
mod counters;
mod device;
mod disk;
mod endpoint;
mod error;
mod execute;
mod faults;
mod lock;
mod memory;
mod notify;
mod options;
mod pool;
pub mod postcopy;
mod present;
mod queue;
mod range;
mod rate;
mod relay;
#[doc(hidden)] // For the benchmark.
pub mod request;
mod server;
mod shared;
mod signals;
mod stats;
mod topology;
mod zero;

pub use counters::{Counters, Snapshot};
pub use device::{BlkBackend, Requests};
pub use disk::{Disk, DiskOptions};
pub use endpoint::Endpoint;
pub use error::{Error, Result};
pub use memory::{AtomicMemory, Memory, Vring};
pub use options::{DeviceOptions, MAX_BLOCK_SIZE, MAX_QUEUES, MIN_BLOCK_SIZE, Options, Postcopy};
pub use server::serve;

/// Compiles the examples of the README as doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
