// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

/// The protocol feature flags, re-exported from the vhost crate.
pub use vhost::vhost_user::message::VhostUserProtocolFeatures;

mod back_end;
mod connect;
mod deadline;
mod error;
mod hang_up;
mod hotplug;
mod options;
mod regions;
mod requests;
mod share;
mod sharing;
mod vring;

pub use self::{
    back_end::BackEnd,
    error::{Error, ErrorKind},
    hang_up::HangUp,
    options::Options,
    vring::Vring,
};

/// The result type of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;
