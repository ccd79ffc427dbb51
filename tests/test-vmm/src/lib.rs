// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod cli;
mod disk;
mod event_loop;
pub mod exits;
mod new_image;
pub mod options;
mod run;
mod run_options;
mod verify;
