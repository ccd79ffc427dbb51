// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `HostCache`, the cache as one process of the host uses it.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, getrlimit};

use super::chunk_key::{ChunkKey, PackKey};
use super::claim::{Claim, RANKS};
use super::directory::Directory;
use super::error::{CacheError, CacheErrorKind};
use super::evict::evict;
use super::health::Health;
use super::pack_file::PackFile;
use super::stats::{CacheStats, Counters};

/// Smallest size of a cache, in bytes.
const LEAST_SIZE: u64 = 1 << 20;
/// Maximum number of packs that are kept open: 128 GiB of memory, and 8 KiB for each.
const MOST_OPEN: u64 = 4096;
/// The part of the descriptors that this process may have which open packs take, two each.
const DESCRIPTORS: u64 = 4;
/// The part of the size that eviction leaves free for what all processes write until they look
/// again.
const FREE: u64 = 8;
/// The part of the size that a process writes before it looks again. 32 processes fill no more than
/// what eviction leaves free.
const STEP: u64 = 256;

/// A directory with decoded chunks of images, shared by all processes of the host that use it.
///
/// Chunks that another process of the host has read come from the directory, and a chunk that
/// several processes need at once is fetched by one of them. There is no daemon, and nothing has to
/// be shut down: a process may be stopped or killed at any time, and so may the host.
///
/// Every page is compared with its hash at each read from the cache; one that differs is fetched
/// again. The hashes detect damage, but no intent: **each user who can write to the directory can
/// change what guests read.** Those who can read it can read the memory of all snapshots in it.
/// Files are created for their owner alone, or for the group as well if the directory is writable
/// for its group.
///
/// The packs that were used longest ago are removed before their files occupy more than the size;
/// with more than 32 processes that write at the same time, each further one may exceed it by a
/// 256th for a moment. If the disk is full, the process reads on from the cache and adds nothing to
/// it; after any other error of the disk it reads from the store only. Either is one line in the
/// log.
///
/// The files of packs are kept open, with up to a quarter of the descriptors that the process may
/// have when it opens the cache.
///
/// Clones are the same cache.
#[derive(Clone, Debug)]
pub struct HostCache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    directory: Directory,
    size: u64,
    open: Mutex<OpenPacks>,
    health: Health,
    counters: Counters,
    /// Bytes that were written since the size was looked at.
    written: AtomicU64,
    /// Whether the log has a line about a file that cannot be used.
    said: AtomicBool,
}

/// The packs that are kept open, with the time of their last use.
#[derive(Debug)]
struct OpenPacks {
    packs: HashMap<PackKey, (u64, Arc<PackFile>)>,
    /// Maximum number of packs.
    most: u64,
    now: u64,
}

impl OpenPacks {
    fn new() -> Self {
        // A program may raise its limit before.
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = (limit / DESCRIPTORS / 2).clamp(1, MOST_OPEN);
        OpenPacks { packs: HashMap::new(), most, now: 0 }
    }

    fn get(&mut self, key: &PackKey) -> Option<Arc<PackFile>> {
        let (used, pack) = self.packs.get_mut(key)?;
        self.now += 1;
        *used = self.now;
        Some(pack.clone())
    }

    fn insert(&mut self, key: PackKey, pack: Arc<PackFile>) {
        if self.packs.len() as u64 >= self.most
            && let Some(oldest) = self.packs.iter().min_by_key(|(_, (used, _))| *used)
        {
            let oldest = *oldest.0;
            self.packs.remove(&oldest);
        }
        self.now += 1;
        self.packs.insert(key, (self.now, pack));
    }
}

/// The outcome of looking for a chunk.
#[derive(Debug)]
pub(crate) enum Look {
    /// Its content.
    Found(Vec<u8>),
    /// The right to fetch it: it is absent.
    Claimed(Claim),
    /// Another claim on it: it will be there soon.
    Busy,
    /// It is absent, and is not kept.
    Absent,
}

impl HostCache {
    /// Opens the cache in a directory, which is created if it does not exist, and removes packs
    /// until they occupy less than `size` bytes.
    ///
    /// # Errors
    ///
    /// [`CacheError`]: a directory that is not local to the host, that any user can write to, or
    /// that this process cannot write to; a size of less than 1 MiB.
    pub fn open(directory: impl AsRef<Path>, size: u64) -> Result<Self, CacheError> {
        let path = directory.as_ref();
        if size < LEAST_SIZE {
            let kind = CacheErrorKind::Size { size, least: LEAST_SIZE };
            return Err(CacheError::new(path, kind));
        }
        let cache = HostCache(Arc::new(Shared {
            directory: Directory::open(path)?,
            size,
            open: Mutex::new(OpenPacks::new()),
            health: Health::default(),
            counters: Counters::default(),
            written: AtomicU64::new(0),
            said: AtomicBool::new(false),
        }));
        cache.0.keep_to_size();
        Ok(cache)
    }

    /// Returns the counters of this process.
    pub fn stats(&self) -> CacheStats {
        self.0.counters.stats()
    }

    /// Reads `len` bytes of a chunk, from `start` on, passes them to `deliver` and returns `true`;
    /// or returns `false` if they are absent, or if reading them could wait for the storage.
    pub(crate) fn read_now(
        &self,
        chunk: &ChunkKey,
        start: usize,
        len: usize,
        deliver: impl FnOnce(&[u8]),
    ) -> bool {
        let pack = if self.0.health.reads() { self.0.open().get(&chunk.pack) } else { None };
        let read = pack.is_some_and(|pack| pack.read_now(chunk, start, len, deliver));
        if read {
            self.0.counters.hit(len);
        }
        read
    }

    /// Reads a chunk, or claims it if it is absent and `may_claim` is set. The claims of so many
    /// `overdue` owners do not count. It may wait for the storage.
    pub(crate) fn look(&self, chunk: &ChunkKey, may_claim: bool, overdue: u32) -> Look {
        let Shared { health, counters, .. } = &*self.0;
        let may_claim = may_claim && overdue < RANKS && health.writes();
        let look = || -> io::Result<Look> {
            if !health.reads() {
                return Ok(Look::Absent);
            }
            let Some(pack) = self.0.pack(&chunk.pack, may_claim)? else { return Ok(Look::Absent) };
            if let Some(content) = pack.read(chunk)? {
                return Ok(Look::Found(content));
            }
            if !may_claim {
                return Ok(Look::Absent);
            }
            for rank in 0..=overdue {
                if let Some(claim) = Claim::take(&pack, chunk.ordinal, rank)? {
                    // Its last owner may have written it since the look above.
                    return Ok(pack.read(chunk)?.map_or(Look::Claimed(claim), Look::Found));
                }
            }
            Ok(Look::Busy)
        };
        let found = look().unwrap_or_else(|error| {
            self.0.note(&error);
            Look::Absent
        });
        match &found {
            Look::Found(content) => counters.hit(content.len()),
            Look::Claimed(claim) => counters.miss(claim.rank() > 0),
            Look::Absent => counters.miss(overdue >= RANKS),
            Look::Busy => {}
        }
        found
    }

    /// Returns whether a chunk is still claimed, not counting the claims of so many `overdue`
    /// owners. It does not wait, and takes a small part of the time of [`look`](Self::look).
    pub(crate) fn is_claimed(&self, chunk: &ChunkKey, overdue: u32) -> bool {
        let pack = self.0.open().get(&chunk.pack);
        overdue < RANKS
            && self.0.health.writes()
            && pack.is_some_and(|pack| {
                (0..=overdue).all(|rank| Claim::is_taken(&pack, chunk.ordinal, rank))
            })
    }

    /// Writes a chunk for the other processes, and ends the claim on it. It may wait for the
    /// storage.
    pub(crate) fn keep(&self, claim: Claim, chunk: &ChunkKey, hashes: &[u8], content: &[u8]) {
        let shared = &self.0;
        // A removed file serves no other process.
        if !shared.health.writes() || !claim.pack().is_current() {
            return;
        }
        let written = claim.pack().write(chunk, hashes, content);
        drop(claim);
        match written {
            Ok(bytes) => {
                shared.counters.wrote(bytes);
                let since = shared.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
                if since >= shared.size / STEP {
                    shared.written.store(0, Ordering::Relaxed);
                    shared.keep_to_size();
                }
            }
            Err(error) => shared.note(&error),
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, OpenPacks> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the file of a pack, which is opened if necessary; `None` if it does not exist and
    /// must not be created, or cannot be used.
    fn pack(&self, key: &PackKey, create: bool) -> io::Result<Option<Arc<PackFile>>> {
        let kept = self.open().get(key);
        if let Some(pack) = kept.filter(|pack| pack.is_current()) {
            return Ok(Some(pack));
        }
        let opened = match PackFile::open(&self.directory, key, create) {
            Err(error) if is_of_one_file(&error) => {
                if !self.said.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "cannot use {} of the host cache {}: {error}; its chunks come from the \
                         store; remove it",
                        key.file_name(),
                        self.directory.path().display()
                    );
                }
                return Ok(None);
            }
            // The process has too many open files: another read may succeed.
            Err(error) if is_of_process(&error) => return Ok(None),
            opened => opened?.map(Arc::new),
        };
        if let Some(pack) = &opened {
            self.open().insert(*key, pack.clone());
        }
        Ok(opened)
    }

    fn note(&self, error: &io::Error) {
        self.health.note(self.directory.path(), error);
    }

    fn keep_to_size(&self) {
        match evict(self.directory.packs(), self.size - self.size / FREE) {
            Ok(packs) => self.counters.evicted(packs),
            Err(error) => self.note(&error.into()),
        }
    }
}

/// Returns whether an error concerns one file: it is a link, a directory or a device, or belongs to
/// another user.
fn is_of_one_file(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, PermissionDenied};
    matches!(error.kind(), InvalidInput | IsADirectory | PermissionDenied)
        || [Some(libc::ELOOP), Some(libc::ENXIO)].contains(&error.raw_os_error())
}

fn is_of_process(error: &io::Error) -> bool {
    [Some(libc::EMFILE), Some(libc::ENFILE)].contains(&error.raw_os_error())
}
