// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user-blk back-end with post-copy.
//!
//! The device serves a raw image or a block device to any vhost-user front-end. It understands
//! `VHOST_USER_PROTOCOL_F_PAGEFAULT`: guest memory may still be missing when the front-end sets
//! the rings running; the device's accesses then fault, and the front-end resolves them.
//!
//! Two rules make that safe:
//!
//! * **No lock is held across a fault that another request needs.** Requests are carried out by
//!   threads that do not wait for each other, and their buffers are touched from user mode before
//!   a system call sees them, so that no kernel lock (the image's inode lock, above all) is ever
//!   held while a page is waited for.
//! * **A page that never arrives is never read as zeros.** Each front-end is served by a process of
//!   its own; if the front-end goes away while a queue waits for a page, that process ends with
//!   the access unfinished, and the next front-end finds a fresh one.
//!
//! [`server::serve`] is the whole daemon; [`device::BlkBackend`] is the device alone, for a
//! program that runs its own `vhost_user_backend::VhostUserDaemon`.

#[cfg(not(target_os = "linux"))]
compile_error!("vhost-device-blk needs Linux");

pub mod args;
pub mod config;
mod connection;
pub mod counters;
pub mod device;
pub mod disk;
pub mod error;
mod execute;
pub mod limits;
mod pool;
pub mod postcopy;
mod present;
mod queue;
pub mod range;
pub mod request;
pub mod server;
mod shared;
mod signals;
pub mod topology;
mod zero;

pub use error::{Error, Result};

/// The examples of the README are compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
