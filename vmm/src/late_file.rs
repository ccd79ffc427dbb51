// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file of a snapshot at a distance, copied here while the guest already runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::sync::LockExt;

/// Pause after a failed read.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest wait of a user for the rest of the file.
const LIMIT: Duration = Duration::from_secs(60);

/// A file in memory whose content arrives in the background.
#[derive(Debug)]
pub(crate) struct LateFile {
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    complete: bool,
    last_error: Option<String>,
}

impl LateFile {
    /// Begins to copy a file of so many bytes, which `read` returns: those from an offset on, at
    /// least one. The copy ends with the last handle.
    pub(crate) fn begin(
        name: &str,
        bytes: u64,
        read: impl FnMut(u64) -> Result<Vec<u8>, String> + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
        file.set_len(bytes)?;
        let this = Arc::new(LateFile { file, state: Mutex::default(), changed: Condvar::new() });
        let weak = Arc::downgrade(&this);
        thread::Builder::new().name("boot-files".into()).spawn(move || copy(&weak, bytes, read))?;
        Ok(this)
    }

    /// Waits until the content is complete, and returns the file.
    pub(crate) fn wait(&self) -> io::Result<&File> {
        let state = self.state.lock_always();
        let waited = self.changed.wait_timeout_while(state, LIMIT, |state| !state.complete);
        let (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.complete {
            return Ok(&self.file);
        }
        let cause = state.last_error.as_deref().unwrap_or("the source has not answered");
        Err(io::Error::new(io::ErrorKind::TimedOut, cause))
    }
}

fn copy(to: &Weak<LateFile>, bytes: u64, mut read: impl FnMut(u64) -> Result<Vec<u8>, String>) {
    let mut at = 0;
    while at < bytes {
        let outcome = read(at);
        // The guest that would boot from it has ended.
        let Some(to) = to.upgrade() else { return };
        let written = outcome.and_then(|content| {
            let written = to.file.write_all_at(&content, at);
            written.map(|()| content.len() as u64).map_err(|error| error.to_string())
        });
        match written {
            Ok(len) => at += len,
            Err(error) => {
                let before = to.state.lock_always().last_error.replace(error.clone());
                if before.is_none() {
                    log::warn!("{error}; it is tried again each second");
                }
                drop(to);
                thread::sleep(PAUSE);
            }
        }
    }
    if let Some(to) = to.upgrade() {
        to.state.lock_always().complete = true;
        to.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_arrives_in_the_background() {
        let content: Vec<u8> = (0..(3 << 20) + 5).map(|at: u32| at.to_le_bytes()[0]).collect();
        let (source, mut failed) = (content.clone(), false);
        let read = move |at| {
            // The second read fails once.
            if at > 0 && !std::mem::replace(&mut failed, true) {
                return Err("the server is away".into());
            }
            let at = usize::try_from(at).unwrap();
            Ok(source[at..source.len().min(at + (1 << 20))].to_vec())
        };
        let late = LateFile::begin("kernel", content.len() as u64, read).unwrap();
        let file = late.wait().unwrap();
        let mut copied = vec![0; content.len()];
        file.read_exact_at(&mut copied, 0).unwrap();
        assert!(copied == content);
    }
}
