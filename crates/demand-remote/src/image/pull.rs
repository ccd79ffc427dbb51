// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies of whole snapshots, and checks of them.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use demand_source::{ImageSummary, ImageWriter};

use super::error::ImageError;
use super::names::{HASHES, MEMORY};
use super::snapshot::{ReadStats, Snapshot};
use super::walk::Walk;
use crate::Store;

/// The summary of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifySummary {
    /// Chunks that were checked: those that are not all zeros.
    pub chunks: u64,
    /// Packs that were checked.
    pub packs: u64,
    /// Side files that were checked.
    pub files: u64,
    /// Requests to the store, and their bytes.
    pub reads: ReadStats,
}

/// Copies a snapshot to a directory: the image as the sparse file `memory`, the table of its page
/// hashes as `hashes` ([`demand_source::HashedImage`]), and each side file by its name. The
/// directory is created if it does not exist; the files must not exist. It calls `progress`
/// repeatedly with the number of bytes of data that were written; `progress` cancels the copy by
/// returning `false`.
///
/// # Errors
///
/// [`ImageError`]. The files that were created are removed.
pub fn pull(
    store: &Store,
    snapshot: &str,
    directory: &Path,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<ImageSummary, ImageError> {
    let snapshot = Arc::new(store.wait(Snapshot::open(store, snapshot))?);
    let failed = |source| ImageError::File { path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let mut created = Created(Vec::new());
    let (memory, hashes) = (directory.join(MEMORY), directory.join(HASHES));
    let geometry = snapshot.head.geometry;
    let generation = snapshot.head.generation;
    let mut writer = ImageWriter::create(&memory, &hashes, geometry.size(), generation)?;
    created.0.extend([memory, hashes]);
    for file in &snapshot.manifest.files {
        let content = store.wait(snapshot.file(&file.name))?;
        let path = directory.join(&file.name);
        let failed = |source| ImageError::File { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let mut out =
            options.write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        created.0.push(path.clone());
        out.write_all(&content).and_then(|()| out.sync_all()).map_err(failed)?;
    }
    let mut done = 0;
    store.wait(async {
        Walk::new(snapshot, false)
            .await?
            .run(|contents| {
                for (chunk, content) in contents {
                    writer.write(geometry.offset(chunk), &content)?;
                    done += content.len() as u64;
                }
                if progress(done) { Ok(()) } else { Err(ImageError::Cancelled) }
            })
            .await
    })?;
    let summary = writer.finish()?;
    created.0.clear();
    Ok(summary)
}

/// Files that are removed unless the copy succeeds.
struct Created(Vec<PathBuf>);

impl Drop for Created {
    fn drop(&mut self) {
        for path in &self.0 {
            // The error that is returned matters more than a file that is left.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Reads a whole snapshot and checks it: the names of all its objects, which are digests, the
/// digest of each chunk, and the hash of each page. It calls `progress` repeatedly with the number
/// of bytes of the image's data that were checked; `progress` cancels the check by returning
/// `false`.
///
/// # Errors
///
/// [`ImageError`] for the first part that is wrong.
pub fn verify(
    store: &Store,
    snapshot: &str,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<VerifySummary, ImageError> {
    let snapshot = Arc::new(store.wait(Snapshot::open(store, snapshot))?);
    let (mut chunks, mut done) = (0, 0);
    store.wait(async {
        for file in &snapshot.manifest.files {
            snapshot.file(&file.name).await?;
        }
        Walk::new(snapshot.clone(), true)
            .await?
            .run(|contents| {
                chunks += contents.len() as u64;
                done += contents.iter().map(|(_, content)| content.len() as u64).sum::<u64>();
                if progress(done) { Ok(()) } else { Err(ImageError::Cancelled) }
            })
            .await
    })?;
    Ok(VerifySummary {
        chunks,
        packs: snapshot.head.packs.len() as u64,
        files: snapshot.manifest.files.len() as u64,
        reads: snapshot.reads.stats(),
    })
}
