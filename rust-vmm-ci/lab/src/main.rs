// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab: a machine emulated by QEMU in which this project's own binaries run
//! with a real KVM, one that has the KVM Userfault ABI, whatever the host offers.
//!
//! `cargo lab run -- CMD ARGS` runs one command there and passes its exit status
//! through; `cargo lab test ARGS` is `cargo test ARGS` with every test binary run
//! there. A fault of the lab itself says so and ends with [`FAULT_STATUS`], so it
//! is never taken for a failure of what ran inside.

mod agent;
mod archive;
mod cache;
mod cli;
mod compile;
mod cpio;
mod debian;
mod guests;
mod initramfs;
mod kernel;
mod machine;
mod modules;
mod protocol;
mod session;
mod suite;
mod tsc;

use std::process::ExitCode;

use clap::Parser;

/// Exit status of a run that the lab, not the command, failed.
const FAULT_STATUS: u8 = 125;

fn main() -> ExitCode {
    match cli::Cli::parse().execute() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab fault: {error:#}");
            ExitCode::from(FAULT_STATUS)
        }
    }
}
