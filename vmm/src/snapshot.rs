// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot: its state, its files, and their publication as one directory.

pub(crate) mod boot_files;
pub mod dir;
pub mod error;
pub(crate) mod image;
pub mod open;
pub(crate) mod remote;
#[cfg(test)]
mod sample;
pub(crate) mod saved;
pub mod state_file;
