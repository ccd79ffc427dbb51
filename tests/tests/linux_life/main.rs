// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest's life apart from its work: the memory it needs to boot, periods in which it does
//! not run, and unrequested ends.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod by_api;
mod clock;
mod ends;
mod room;

use demand_tests::linux_vm::GuestConfig;

fn config(cpus: u32, memory: &str, more: &[&str]) -> GuestConfig {
    let more = more.iter().map(ToString::to_string).collect();
    GuestConfig { cpus, memory: memory.into(), more, ..GuestConfig::default() }
}
