// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod addresses;
pub mod content;
mod error;
pub mod guest_code;
pub mod guest_layout;
pub mod image;
pub mod plan;
pub mod rings;
#[cfg(test)]
mod simulation;
pub mod verify;
pub mod vmm_actor;
pub mod windows;
