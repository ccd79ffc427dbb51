// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the test guest on demand-paged memory.

use std::process::ExitCode;
use std::time::Instant;

use demand_vmm::{limits, logger};

fn main() -> ExitCode {
    let started = Instant::now();
    limits::prepare();
    let code = match test_vmm::cli::main(started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logger::say_error("test-vmm", &error);
            error.exit_code()
        }
    };
    logger::end();
    code
}
