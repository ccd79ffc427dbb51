// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod api;
pub mod arch;
pub mod bench;
pub mod cli;
pub mod config;
pub mod devices;
pub mod error;
pub mod limits;
pub mod logger;
pub mod report;
mod signals;
pub mod snapshot;
mod spool;
pub mod test_guest;
pub mod vcpu;
pub mod virtio;
pub mod vm;
