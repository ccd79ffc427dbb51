// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot: its state, its files, and their publication as one directory.

pub mod boot_files;
pub mod dir;
pub mod open;
pub mod saved;
