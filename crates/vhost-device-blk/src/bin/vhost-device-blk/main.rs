// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `vhost-device-blk` daemon.

mod args;
mod capabilities;
mod limits;
mod logger;
mod socket;

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use vhost_device_blk::serve;

use crate::args::Args;

/// The exit status for a failure.
const FAILURE: u8 = 1;
/// The exit status for a wrong command line.
const USAGE: u8 = 2;
/// The exit status if this host cannot do what was asked.
const HOST: u8 = 3;

fn main() -> ExitCode {
    limits::prepare();
    // By convention, all other arguments are ignored, even those that are wrong.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        return print(format_args!("{}\n", capabilities::json()));
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            return print(error);
        }
        Err(error) => {
            let error = one_line(&error.to_string());
            return fail(USAGE, format_args!("cannot read the command line: {error}; see --help"));
        }
    };
    // The descriptors that it takes over come before those that this process opens.
    let socket = match socket::choose(&args) {
        Ok(socket) => socket,
        Err(error) => return fail(USAGE, error),
    };
    let (level, log_file) = (args.log_level(), args.log_file.clone());
    let options = match args.into_options(socket) {
        Ok(options) => options,
        Err(error) => return fail(USAGE, error),
    };
    if let Err(error) = logger::start(level, log_file.as_deref()) {
        let path = log_file.unwrap_or_default();
        return fail(
            FAILURE,
            format_args!(
                "cannot open --log-file {}: {error}; use a path that this user may write",
                path.display()
            ),
        );
    }
    limits::warn_of_few_files(options.num_queues);
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if log_file.is_some() {
                log::error!("{error}");
            }
            fail(if error.is_of_host() { HOST } else { FAILURE }, error)
        }
    }
}

/// Prints what was asked for on standard output, and returns the exit status.
fn print(text: impl Display) -> ExitCode {
    match write!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILURE, format_args!("cannot write to standard output: {error}")),
    }
}

/// Reports an error on standard error, and returns its exit status.
fn fail(status: u8, error: impl Display) -> ExitCode {
    eprintln!("vhost-device-blk: {error}");
    ExitCode::from(status)
}

/// Returns the error part of clap's message, on one line.
fn one_line(message: &str) -> String {
    let mut line = String::new();
    for part in message.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:")) {
        if part.is_empty() || part.starts_with("For more information") {
            continue;
        }
        let (before, part) = match part.strip_prefix("tip: ") {
            Some(tip) => ("; ", tip),
            None => (" ", part.strip_prefix("error: ").unwrap_or(part)),
        };
        if !line.is_empty() {
            line.push_str(before);
        }
        line.push_str(part);
    }
    line
}
