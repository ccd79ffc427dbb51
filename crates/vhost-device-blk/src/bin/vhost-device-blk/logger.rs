// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log: lines with a time, on standard error or in a file.

use std::fs::File;
use std::io;
use std::path::Path;

use env_logger::{Builder, Target};
use log::LevelFilter;

/// Reports of the counters are asked for, so they are shown at any level.
const REPORTS: &str = "vhost_device_blk::stats";

/// Starts the log, with `level` or, by default, that of the variable `RUST_LOG`. Lines are appended
/// to `file`, if given.
///
/// # Errors
/// The host's error if the file cannot be opened.
pub(crate) fn start(level: Option<LevelFilter>, file: Option<&Path>) -> io::Result<()> {
    let mut builder = Builder::new();
    builder.filter_level(level.unwrap_or(LevelFilter::Warn)).format_timestamp_micros();
    if level.is_none() {
        builder.parse_default_env();
    }
    builder.filter_module(REPORTS, LevelFilter::Info);
    if let Some(file) = file {
        // In one system call for each line, so that lines of several processes stay whole.
        let file = File::options().append(true).create(true).open(file)?;
        builder.target(Target::Pipe(Box::new(file)));
    }
    builder.init();
    Ok(())
}
