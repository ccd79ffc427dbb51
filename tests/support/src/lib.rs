// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fixtures shared by the tests of several crates: the host's capabilities, waits, an image with
//! sources that serve it, servers, a link with faults to them, a disk that records its writes,
//! processes with settings, copied programs, and kernels in ELF.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

pub mod child;
pub mod elf;
pub mod fuse;
pub mod garage;
pub mod host;
pub mod image;
#[cfg(feature = "openapi")]
pub mod openapi;
pub mod power_cut;
pub mod program;
pub mod proxy;
pub mod servers;
pub mod wait;
