// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands for a process that begins without a VM: `create`, `boot`, `restore --into` and
//! `events`.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::api::client::Client;
use crate::cli::config_file::GivenParts;
use crate::cli::error::CliError;
use crate::cli::output::print;
use crate::cli::{ApiArgs, say_state};
use crate::config::vm::{RestoreConfig, VmConfig};
use crate::error::Error;

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// The VM's configuration: TOML if the file's name ends with .toml, else JSON, as the API's
    /// vm.create takes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Defines the VM of a process that has none.
pub(super) fn create(args: &CreateArgs) -> Result<(), Error> {
    let config: VmConfig = GivenParts::default().over(Some(&args.config))?;
    // The VMM's working directory differs from this process's.
    let config = config.absolute().map_err(|source| CliError::ConfigPath { source })?;
    say_state(&Client::new(&args.api.api_socket).create(&config)?)
}

/// Restores a VM in the process that serves its API on this socket.
pub(super) fn restore_into(socket: &Path, config: RestoreConfig) -> Result<(), Error> {
    let config = config.absolute().map_err(|source| CliError::ConfigPath { source })?;
    say_state(&Client::new(socket).restore(&config)?)
}

/// Prints the events of a VM until it has ended.
pub(super) fn events(args: &ApiArgs) -> Result<(), Error> {
    let mut events = Client::new(&args.api_socket).events()?;
    while let Some(event) = events.next_event()? {
        let line = serde_json::to_string(&event).map_err(|source| CliError::Json { source })?;
        print(&(line + "\n"))?;
    }
    Ok(())
}
