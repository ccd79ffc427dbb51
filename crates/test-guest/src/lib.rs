// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod content;
pub mod guest_code;
pub mod guest_layout;
pub mod plan;
pub mod rings;
pub mod verify;
pub mod windows;

// The parts of a plan.
mod actor;
mod builder;
mod emit;
mod params;
mod step;
mod traffic;
mod unit;

// The parts of the verifier.
mod verify_disk;
mod verify_memory;
mod verify_outside;
mod verify_rings;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod verify_tests;
