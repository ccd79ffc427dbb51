// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shell completions and man pages, made of the description of the command line.

use std::path::Path;

use clap::Command;
use clap_complete::Shell;

use crate::cli::error::CliError;
use crate::cli::output::print;
use crate::error::Error;

/// Prints the script with which `shell` completes the options of `program`.
pub(crate) fn print_completions(mut program: Command, shell: Shell) -> Result<(), Error> {
    let name = program.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Writes a man page for `program` and for each of its commands into `folder`.
pub(crate) fn write_pages(program: Command, folder: &Path) -> Result<(), Error> {
    let failed = |source| CliError::ManPages { folder: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(program, folder).map_err(failed)?;
    print(&format!("man pages are in {}\n", folder.display()))
}
