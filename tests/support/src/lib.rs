// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fixtures shared by the tests of several crates: the host's capabilities, waits, and an image
//! with sources that serve it.

pub mod fuse;
pub mod host;
pub mod image;
pub mod wait;
