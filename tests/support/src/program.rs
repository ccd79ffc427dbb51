// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that another user runs.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Copies a program into a folder, and makes both readable for all users.
///
/// Another process copies it: a child that another thread starts at that time would otherwise
/// inherit the descriptor open for writing, and the copy could not be run until the child's `exec`
/// (ETXTBSY).
///
/// # Errors
///
/// The system's, and if the program could not be copied.
pub fn copy_for_everybody(program: &Path, folder: &Path) -> io::Result<PathBuf> {
    let copy = folder.join(program.file_name().unwrap_or(program.as_os_str()));
    let status = Command::new("install").args(["-m", "755"]).args([program, &copy]).status()?;
    if !status.success() {
        let cause = format!("install ended with {status}");
        return Err(io::Error::other(format!("cannot copy {}: {cause}", program.display())));
    }
    fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    Ok(copy)
}
