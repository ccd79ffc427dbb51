// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod device;
pub mod interrupt;
pub mod options;
pub mod queue;
pub mod tcp;

/// The result of an example, whose error is printed as one line.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
