// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod api;
pub mod config;
pub mod error;
pub mod snapshot;
pub mod vcpu;
pub mod vm;

// Not an interface: public only for the binary, the test programs and the fuzz targets.
#[doc(hidden)]
pub mod arch;
#[doc(hidden)]
pub mod bench;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod limits;
#[doc(hidden)]
pub mod logger;
#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod virtio;

mod devices;
mod late_file;
mod patience;
mod signals;
mod spool;
mod sync;
