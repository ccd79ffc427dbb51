// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab: a machine emulated by QEMU that runs this project's binaries with a real KVM, which
//! supports KVM Userfault, whatever the host offers.
//!
//! `cargo lab run -- CMD ARGS` runs one command in the lab and passes its exit status through;
//! `cargo lab test ARGS` is `cargo test ARGS` with each test binary run in the lab. A fault of the
//! lab itself is reported as one and ends with [`FAULT_STATUS`], so it cannot be mistaken for a
//! failure of the command.

mod agent;
mod archive;
mod cache;
mod cli;
mod compile;
mod cpio;
mod debian;
mod guests;
mod initramfs;
mod inputs;
mod kernel;
mod machine;
mod modules;
mod protocol;
mod session;
mod suite;
mod tsc;

use std::process::ExitCode;

use clap::Parser;

/// Exit status of a run that failed because of the lab, not the command.
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
