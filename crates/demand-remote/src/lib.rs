// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

#[cfg(feature = "image")]
pub mod image;
#[cfg(feature = "nbd")]
pub mod nbd;
mod runtime;
#[cfg(feature = "store")]
mod store;

#[cfg(feature = "store")]
pub use store::{Store, StoreError};
