// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A directory as a store: its creation, and the drafts that interrupted writes leave in it.
//!
//! Each object is written to a draft, `NAME#NUMBER`, which is synced and renamed, and its folder is
//! synced after that. So a power cut leaves no object in part, and none is lost once it is written.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use object_store::local::LocalFileSystem;

#[cfg(feature = "image")]
use crate::Listed;
use crate::store::BoxError;

/// Opens a directory, and creates it if it does not exist.
pub(crate) fn open(path: &Path) -> Result<LocalFileSystem, BoxError> {
    create(path)?;
    Ok(LocalFileSystem::new_with_prefix(path)?.with_fsync(true))
}

/// Creates a directory with those above it, so that a power cut does not remove it.
fn create(path: &Path) -> io::Result<()> {
    let new: Vec<_> = path.ancestors().take_while(|folder| is_missing(folder)).collect();
    fs::create_dir_all(path)?;
    for folder in new {
        let above = folder.parent().filter(|above| !above.as_os_str().is_empty());
        File::open(above.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

fn is_missing(folder: &Path) -> bool {
    !folder.as_os_str().is_empty() && !folder.exists()
}

/// Returns the drafts in a folder of the store, and in those below it.
///
/// # Errors
///
/// The system's error, with the path.
#[cfg(feature = "image")]
pub(crate) fn drafts(store: &Path, folder: &str) -> io::Result<Vec<Listed>> {
    let mut drafts = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(store.join(&folder)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            // No object has a name that is not of UTF-8.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = format!("{folder}/{name}");
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                // It was renamed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if meta.is_dir() {
                folders.push(name);
            } else if is_draft(&name) {
                drafts.push(Listed { name, len: meta.len(), changed: meta.modified()? });
            }
        }
    }
    Ok(drafts)
}

/// Returns whether a name is that of a draft, which no object can have.
#[cfg(feature = "image")]
fn is_draft(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, number)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}
