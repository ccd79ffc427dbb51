// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

#[cfg(feature = "cache")]
mod cache;
#[cfg(feature = "store")]
mod cause;
#[cfg(feature = "http")]
mod client;
#[cfg(feature = "store")]
mod directory;
#[cfg(feature = "image")]
mod hex;
#[cfg(feature = "image")]
pub mod image;
#[cfg(feature = "store")]
mod location;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "store")]
mod object;
#[cfg(feature = "store")]
mod object_image;
#[cfg(feature = "store")]
mod queue;
mod runtime;
#[cfg(feature = "s3")]
mod s3;
#[cfg(feature = "store")]
mod store;
#[cfg(feature = "image")]
pub mod working_set;

#[cfg(feature = "cache")]
pub use cache::{CacheError, CacheErrorKind, CacheStats, HostCache};
#[cfg(feature = "store")]
pub use location::{Location, LocationError};
#[cfg(feature = "store")]
pub use object_image::ObjectImage;
#[cfg(feature = "store")]
pub use store::{Listed, Store, StoreError};
