// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of the log, which all commands have.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args};
use log::LevelFilter;

use crate::logger::LogConfig;

/// The levels, from the quietest on.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The options of the log.
#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Append the log to this file instead of writing it to standard error. Its level is info,
    /// unless another one is given.
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
    /// Log more than warnings: -v info, -vv debug, -vvv trace.
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "log_level")]
    verbose: u8,
    /// Log messages of this level and above. Without it and -v, the variable RUST_LOG decides.
    #[arg(long, value_name = "LEVEL", global = true, value_parser = level_parser())]
    log_level: Option<LevelFilter>,
}

fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(LEVELS)
        .map(|level| level.parse().expect("each of them is the name of a level"))
}

impl LogArgs {
    /// Returns the file that the log is appended to, if one is given.
    pub fn file(&self) -> Option<&Path> {
        self.log_file.as_deref()
    }

    /// Returns the level and the destination of the log.
    pub fn config(&self) -> LogConfig {
        let more = match self.verbose {
            0 => None,
            1 => Some(LevelFilter::Info),
            2 => Some(LevelFilter::Debug),
            _ => Some(LevelFilter::Trace),
        };
        LogConfig { file: self.log_file.clone(), level: self.log_level.or(more) }
    }
}
