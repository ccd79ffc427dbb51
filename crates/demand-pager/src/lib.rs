// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod calls;
mod connection;
mod error;
#[cfg(feature = "firecracker")]
pub mod firecracker;
#[doc(hidden)]
pub mod fuzzing;
mod location;
mod options;
pub mod protocol;
mod queue;
mod receive;
mod source;
mod watched;

pub use calls::Calls;
pub use error::{PagerError, PagerErrorKind};
pub use location::{Location, LocationError};
pub use options::PagerOptions;
pub use source::PagerSource;
