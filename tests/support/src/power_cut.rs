// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk in memory that records its writes, and the contents that a power cut may leave of them.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::fuse::attributes;
use crate::host::skip;

/// The kernel caches nothing.
const TTL: Duration = Duration::ZERO;
const ROOT: u64 = 1;

/// A name in a folder.
type Name = (u64, OsString);

#[derive(Clone, Debug)]
enum Write {
    Create { name: Name, inode: u64 },
    Remove(Name),
    Rename { from: Name, to: Name },
    Content { inode: u64, offset: usize, bytes: Vec<u8> },
    Length { inode: u64, len: usize },
    Sync(u64),
}

/// Names and content of files; an inode without content is a folder.
#[derive(Clone, Debug, Default)]
struct Contents {
    names: BTreeMap<Name, u64>,
    files: BTreeMap<u64, Vec<u8>>,
}

/// The files of a disk: what programs see, and what a power cut cannot take.
#[derive(Clone, Debug, Default)]
struct Disk {
    seen: Contents,
    synced: Contents,
}

impl Disk {
    fn apply(&mut self, write: &Write) {
        let Contents { names, files } = &mut self.seen;
        match write {
            Write::Create { name, inode } => drop(names.insert(name.clone(), *inode)),
            Write::Remove(name) => drop(names.remove(name)),
            Write::Rename { from, to } => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
            Write::Content { inode, offset, bytes } => {
                let file = files.entry(*inode).or_default();
                file.resize(file.len().max(offset + bytes.len()), 0);
                file[*offset..][..bytes.len()].copy_from_slice(bytes);
            }
            Write::Length { inode, len } => files.entry(*inode).or_default().resize(*len, 0),
            Write::Sync(inode) => match files.get(inode) {
                Some(file) => drop(self.synced.files.insert(*inode, file.clone())),
                None => {
                    self.synced.names.retain(|(folder, _), _| folder != inode);
                    let here = names.iter().filter(|((folder, _), _)| folder == inode);
                    self.synced.names.extend(here.map(|(name, inode)| (name.clone(), *inode)));
                }
            },
        }
    }

    /// Returns the files that a power cut leaves.
    fn cut(&self, left: &Left) -> Files {
        let Disk { seen, synced } = self;
        let mut chance = 0;
        let mut kept = |is_kept: bool| match left {
            Left::Chance(seed) if !is_kept => {
                chance += 1;
                let mut hasher = DefaultHasher::new();
                (seed, chance).hash(&mut hasher);
                hasher.finish().is_multiple_of(2)
            }
            _ => is_kept,
        };
        let names = match left {
            Left::Synced => synced.names.clone(),
            Left::Chance(_) => {
                let both = synced.names.iter().chain(&seen.names);
                let choose = |(name, inode): (&Name, &u64)| {
                    let is_settled = synced.names.get(name) == seen.names.get(name);
                    kept(is_settled).then(|| (name.clone(), *inode))
                };
                both.filter_map(choose).collect()
            }
            _ => seen.names.clone(),
        };
        let content = |inode: &u64, file: &Vec<u8>| -> Vec<u8> {
            let synced = synced.files.get(inode).cloned().unwrap_or_default();
            match left {
                Left::All => file.clone(),
                Left::Synced | Left::Short => synced,
                Left::Zeros => {
                    let mut content = synced;
                    content.resize(file.len(), 0);
                    content
                }
                Left::Chance(_) if synced == *file => synced,
                Left::Chance(seed) => {
                    let mut content = synced;
                    content.resize(file.len(), 0);
                    // Pages arrive in any order.
                    for (page, bytes) in file.chunks(4096).enumerate() {
                        if !(page as u64 + seed + inode).is_multiple_of(3) {
                            content[page * 4096..][..bytes.len()].copy_from_slice(bytes);
                        }
                    }
                    content
                }
            }
        };
        let mut files = BTreeMap::new();
        let mut folders = vec![(ROOT, PathBuf::new())];
        while let Some((folder, path)) = folders.pop() {
            for ((_, name), inode) in names.iter().filter(|((within, _), _)| *within == folder) {
                let path = path.join(name);
                match seen.files.get(inode) {
                    Some(file) => drop(files.insert(path, content(inode, file))),
                    None => folders.push((*inode, path)),
                }
            }
        }
        Files(files)
    }
}

/// The part of the writes that a power cut leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// All, in their order.
    All,
    /// The names that their folder was synced with, and the content that was synced.
    Synced,
    /// All names and lengths, and zeros where content was not synced.
    Zeros,
    /// All names, and the content that was synced.
    Short,
    /// Any names and pages of those that were not synced.
    Chance(u64),
}

/// Files by their paths on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Files(pub BTreeMap<PathBuf, Vec<u8>>);

impl Files {
    /// Returns the files below a folder, by their paths there.
    pub fn below(&self, folder: impl AsRef<Path>) -> BTreeMap<PathBuf, Vec<u8>> {
        let relative = |path: &PathBuf| path.strip_prefix(&folder).ok().map(Path::to_owned);
        self.0.iter().filter_map(|(path, file)| Some((relative(path)?, file.clone()))).collect()
    }

    /// Writes the files below the folder `from` to another one.
    ///
    /// # Panics
    ///
    /// If one cannot be written.
    pub fn write(&self, from: &Path, to: &Path) {
        for (path, content) in self.below(from) {
            let path = to.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }
}

/// A power cut: when it happened, and what it has left.
#[derive(Clone, Debug)]
pub struct Cut {
    /// The number of writes before it, the last of them, and the part that is left.
    pub what: String,
    /// The files.
    pub files: Files,
    /// Whether all writes happened in their order, so that only the last may be missing.
    pub in_order: bool,
}

struct State {
    disk: Disk,
    writes: Vec<Write>,
    changed: HashMap<u64, SystemTime>,
    next: u64,
}

/// A disk whose writes are recorded. It is mounted until this is dropped.
pub struct RecordedDisk {
    state: Arc<Mutex<State>>,
    // Unmounted before the folder is removed.
    _session: BackgroundSession,
    folder: tempfile::TempDir,
}

impl RecordedDisk {
    /// Mounts an empty disk. Returns `None`, which skips the test, where that is impossible or not
    /// permitted.
    ///
    /// # Panics
    ///
    /// If there is no folder for it.
    pub fn new() -> Option<RecordedDisk> {
        let state = State {
            disk: Disk::default(),
            writes: Vec::new(),
            changed: HashMap::new(),
            next: ROOT + 1,
        };
        let state = Arc::new(Mutex::new(state));
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("recorded-disk".into())];
        match fuser::spawn_mount(Server(state.clone()), folder.path(), &config) {
            Ok(session) => Some(RecordedDisk { state, _session: session, folder }),
            Err(error) => {
                skip(&format!("a FUSE file system is needed (/dev/fuse, root): {error}"));
                None
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the path at which it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the number of writes so far.
    pub fn writes(&self) -> usize {
        self.state().writes.len()
    }

    /// Returns what power cuts may leave, after each of the writes from number `first` on, each
    /// set of files once. The last one has all that was synced in the end.
    pub fn cuts(&self, first: usize) -> Vec<Cut> {
        let state = self.state();
        let (mut disk, mut cuts, mut known) = (Disk::default(), Vec::new(), HashSet::new());
        let mut add = |what: String, disk: &Disk, left: &Left| {
            let files = disk.cut(left);
            let mut hasher = DefaultHasher::new();
            files.hash(&mut hasher);
            if known.insert(hasher.finish()) {
                let in_order = *left == Left::All;
                cuts.push(Cut { what: format!("{what}, {left:?}"), files, in_order });
            }
        };
        for (number, write) in state.writes.iter().enumerate() {
            if number >= first
                && let Write::Content { inode, offset, bytes } = write
            {
                let mut torn = disk.clone();
                let bytes = bytes[..bytes.len() / 2].to_vec();
                torn.apply(&Write::Content { inode: *inode, offset: *offset, bytes });
                add(format!("in write {number}"), &torn, &Left::All);
            }
            disk.apply(write);
            if number < first {
                continue;
            }
            let mut what = format!("after write {number}, {write:?}");
            what.truncate(160);
            let lefts = [Left::All, Left::Synced, Left::Zeros, Left::Short];
            for left in lefts.into_iter().chain((0..3).map(Left::Chance)) {
                add(what.clone(), &disk, &left);
            }
        }
        cuts
    }

    /// Syncs all, as time does.
    pub fn settle(&self) {
        let mut state = self.state();
        let inodes: Vec<_> = (ROOT..state.next).collect();
        inodes.into_iter().for_each(|inode| state.write(Write::Sync(inode)));
    }

    /// Returns the files as programs see them.
    pub fn files(&self) -> Files {
        self.state().disk.cut(&Left::All)
    }

    /// Returns what a power cut leaves now of what was synced.
    pub fn synced(&self) -> Files {
        self.state().disk.cut(&Left::Synced)
    }
}

impl std::fmt::Debug for RecordedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordedDisk").field("path", &self.path()).finish_non_exhaustive()
    }
}

impl State {
    fn write(&mut self, write: Write) {
        self.disk.apply(&write);
        if let Write::Content { inode, .. } | Write::Length { inode, .. } = write {
            self.changed.insert(inode, SystemTime::now());
        }
        self.writes.push(write);
    }

    fn find(&self, folder: INodeNo, name: &OsStr) -> Option<u64> {
        self.disk.seen.names.get(&(folder.0, name.to_owned())).copied()
    }

    /// Creates a folder, or a file.
    fn create(&mut self, folder: INodeNo, name: &OsStr, is_file: bool) -> Option<FileAttr> {
        if self.find(folder, name).is_some() {
            return None;
        }
        let inode = self.next;
        self.next += 1;
        if is_file {
            self.write(Write::Length { inode, len: 0 });
        }
        self.write(Write::Create { name: (folder.0, name.to_owned()), inode });
        Some(self.attributes(inode))
    }

    fn attributes(&self, inode: u64) -> FileAttr {
        let size = self.disk.seen.files.get(&inode).map(|file| file.len() as u64);
        let changed = self.changed.get(&inode).copied().unwrap_or(SystemTime::UNIX_EPOCH);
        attributes(INodeNo(inode), size, changed)
    }
}

struct Server(Arc<Mutex<State>>);

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.state();
        let Some(inode) = state.find(folder, name) else { return reply.error(Errno::ENOENT) };
        if state.disk.seen.names.keys().any(|(folder, _)| *folder == inode) {
            return reply.error(Errno::ENOTEMPTY);
        }
        state.write(Write::Remove((folder.0, name.to_owned())));
        reply.ok();
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        match state.find(folder, name) {
            Some(inode) => reply.entry(&TTL, &state.attributes(inode), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.state().attributes(inode.0));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let Some(size) = size {
            state.write(Write::Length { inode: inode.0, len: size as usize });
        }
        reply.attr(&TTL, &state.attributes(inode.0));
    }

    fn mkdir(&self, _: &Request, folder: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        match self.state().create(folder, name, false) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::EEXIST),
        }
    }

    fn create(
        &self,
        _: &Request,
        folder: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        match self.state().create(folder, name, true) {
            Some(attributes) => {
                let flags = FopenFlags::empty();
                reply.created(&TTL, &attributes, Generation(0), FileHandle(0), flags);
            }
            None => reply.error(Errno::EEXIST),
        }
    }

    fn unlink(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(folder, name, reply);
    }

    fn rmdir(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(folder, name, reply);
    }

    fn rename(
        &self,
        _: &Request,
        folder: INodeNo,
        name: &OsStr,
        to_folder: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = ((folder.0, name.to_owned()), (to_folder.0, to.to_owned()));
        self.state().write(Write::Rename { from, to });
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let file = state.disk.seen.files.get(&inode.0).map_or(&[][..], Vec::as_slice);
        let start = file.len().min(offset as usize);
        reply.data(&file[start..file.len().min(start + size as usize)]);
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (offset, bytes) = (offset as usize, data.to_vec());
        self.state().write(Write::Content { inode: inode.0, offset, bytes });
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.state().write(Write::Sync(inode.0));
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.state().write(Write::Sync(inode.0));
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        folder: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let state = self.state();
        let names = state.disk.seen.names.iter().filter(|((within, _), _)| *within == folder.0);
        for (next, ((_, name), inode)) in (1..).zip(names).skip(offset as usize) {
            if reply.add(INodeNo(*inode), next, state.attributes(*inode).kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use super::*;

    #[test]
    fn unsynced_writes_may_be_lost() {
        let Some(disk) = RecordedDisk::new() else { return };
        let at = disk.path().join("folder");
        fs::create_dir(&at).unwrap();
        File::open(disk.path()).unwrap().sync_all().unwrap();
        let before = disk.writes();
        let mut file = File::create(at.join("draft")).unwrap();
        file.write_all(b"content").unwrap();
        fs::rename(at.join("draft"), at.join("file")).unwrap();
        let left = |name: &str, content: &[u8]| {
            Files([(Path::new("folder").join(name), content.to_vec())].into())
        };
        let cuts = |disk: &RecordedDisk| -> Vec<Files> {
            disk.cuts(before).into_iter().map(|cut| cut.files).collect()
        };
        let unsynced = cuts(&disk);
        assert_eq!(fs::read(at.join("file")).unwrap(), b"content");
        for (name, content) in
            [("draft", &b""[..]), ("draft", b"con"), ("file", b"content"), ("file", &[0; 7])]
        {
            assert!(unsynced.contains(&left(name, content)), "{name}: {content:?}");
        }
        assert!(unsynced.contains(&Files(BTreeMap::new())) && disk.synced().0.is_empty());
        file.sync_all().unwrap();
        assert!(disk.synced().0.is_empty());
        File::open(&at).unwrap().sync_all().unwrap();
        assert_eq!(disk.synced(), left("file", b"content"));
    }
}
