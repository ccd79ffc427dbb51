// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The reference VMM of demand-paging.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    env_logger::Builder::from_env(env_logger::Env::new().default_filter_or("warn"))
        .format_timestamp_micros()
        .init();
    match demand_vmm::cli::main(started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demand-vmm: {error}");
            error.exit_code()
        }
    }
}
