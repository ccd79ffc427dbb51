// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `vhost-device-blk` daemon.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use vhost_device_blk::args::Args;
use vhost_device_blk::{limits, server};

/// The exit status for a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    limits::prepare();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();

    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            print!("{e}");
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            eprintln!(
                "vhost-device-blk: cannot read the command line: {}; see --help",
                one_line(&e.to_string())
            );
            return ExitCode::from(USAGE);
        }
    };

    match args.into_options().and_then(|options| server::serve(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vhost-device-blk: {e}");
            ExitCode::from(e.exit_status())
        }
    }
}

/// Returns the error part of clap's message, on one line.
fn one_line(message: &str) -> String {
    let mut line = String::new();
    for part in message.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:")) {
        if part.is_empty() || part.starts_with("For more information") {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(part.strip_prefix("error: ").unwrap_or(part));
    }
    line
}
