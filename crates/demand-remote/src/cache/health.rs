// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The use that a process still makes of a cache after errors of its storage.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

const READ_AND_WRITE: u8 = 0;
const READ_ONLY: u8 = 1;
const OFF: u8 = 2;

/// The use of the cache, which only ever shrinks: a full disk ends its growth, and any other error
/// of the storage all of it. The log has one line for each of these steps.
#[derive(Debug, Default)]
pub(crate) struct Health(AtomicU8);

impl Health {
    pub(crate) fn reads(&self) -> bool {
        self.0.load(Ordering::Relaxed) != OFF
    }

    pub(crate) fn writes(&self) -> bool {
        self.0.load(Ordering::Relaxed) == READ_AND_WRITE
    }

    /// Notes an error of the storage.
    pub(crate) fn note(&self, path: &Path, error: &io::Error) {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        let path = path.display();
        match error.kind() {
            StorageFull | QuotaExceeded | FileTooLarge | ReadOnlyFilesystem => {
                if self.0.fetch_max(READ_ONLY, Ordering::Relaxed) < READ_ONLY {
                    log::warn!(
                        "cannot write to the host cache {path}: {error}; this process adds nothing \
                         to it any more; free some space, or give the cache a smaller size"
                    );
                }
            }
            _ => {
                if self.0.fetch_max(OFF, Ordering::Relaxed) < OFF {
                    log::warn!(
                        "cannot use the host cache {path}: {error}; this process reads all chunks \
                         from the store from now on; check the disk"
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_ends_writes_only() {
        let health = Health::default();
        let note = |errno| health.note(Path::new("/cache"), &io::Error::from_raw_os_error(errno));
        assert!(health.reads() && health.writes());
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EROFS] {
            note(errno);
            assert!(health.reads() && !health.writes());
        }
        note(libc::EIO);
        assert!(!health.reads() && !health.writes());
        note(libc::ENOSPC);
        assert!(!health.reads());
    }
}
