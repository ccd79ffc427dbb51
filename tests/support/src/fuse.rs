// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file whose storage stops answering, implemented by a FUSE server in another process.
//!
//! A separate process is necessary because a process that waits for its own server cannot end: its
//! files are closed after its last thread ends, and that thread waits for one of them.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyLseek, ReplyOpen,
    Request,
};

use crate::host::skip;

const NAME: &str = "image";
const MOUNT: &str = "mount";
const CONTENT: &str = "content";
const FILE: INodeNo = INodeNo(2);
/// The kernel caches nothing: each look-up of the file asks the server.
const TTL: Duration = Duration::ZERO;

type Answer = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// Ranges of bytes whose reads are held back, or fail with an error.
    held: Vec<Range<u64>>,
    failing: Vec<Range<u64>>,
    /// Whether the server answers only the requests needed to open the file.
    silent: bool,
    waiting: Vec<Answer>,
}

struct Shared {
    content: Vec<u8>,
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let size = (inode != INodeNo::ROOT).then_some(self.content.len() as u64);
        attributes(inode, size, UNIX_EPOCH)
    }
}

/// Returns the attributes of a file of this size in bytes, or of a folder, which has none.
pub(crate) fn attributes(inode: INodeNo, size: Option<u64>, changed: SystemTime) -> FileAttr {
    let is_file = size.is_some();
    let size = size.unwrap_or(0);
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: changed,
        mtime: changed,
        ctime: changed,
        crtime: changed,
        kind: if is_file { FileType::RegularFile } else { FileType::Directory },
        perm: if is_file { 0o644 } else { 0o755 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

/// The environment variable that names the folder for the server process.
const FOLDER: &str = "SLOW_FILE_FOLDER";
/// The start of each answer of the server.
const SAYS: &str = "slow-file: ";

/// A file on a FUSE file system that answers only while a test permits it. It is mounted until this
/// is dropped.
///
/// The file's server is the test program, run once more: it needs a test named `storage_server`
/// that calls [`serve`].
#[derive(Debug)]
pub struct SlowFile {
    folder: tempfile::TempDir,
    server: Arc<Mutex<Client>>,
}

#[derive(Debug)]
struct Client {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Client {
    /// Sends the server a command, and returns the number in its answer.
    fn ask(&mut self, what: &str) -> io::Result<usize> {
        let input = self.process.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        writeln!(input, "{what}")?;
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some((_, answer)) = line.trim().split_once(SAYS) {
                return answer.parse().map_err(|_| io::Error::other(answer.to_owned()));
            }
        }
    }
}

impl SlowFile {
    /// Mounts the file. Returns `None`, which skips the test, where that is impossible or not
    /// permitted.
    ///
    /// # Panics
    ///
    /// If the server cannot be run.
    pub fn new(content: &[u8]) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(MOUNT)).unwrap();
        std::fs::write(folder.path().join(CONTENT), content).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage_server", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        let server = Arc::new(Mutex::new(Client { process, answers }));
        let file = SlowFile { folder, server };
        let mounted = file.client().ask("waiting");
        match mounted {
            Ok(_) => Some(file),
            Err(error) => {
                skip(&format!("a FUSE file system is needed (/dev/fuse, root): {error}"));
                None
            }
        }
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, what: &str) -> usize {
        self.client().ask(what).unwrap()
    }

    /// Returns the file's path.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(MOUNT).join(NAME)
    }

    /// Creates one with the content of the file at `path`, and shows it there until the guard is
    /// dropped, which lets all waiting requests be answered first. As for [`new`](Self::new).
    ///
    /// # Panics
    ///
    /// If the server cannot be run, or the file not be read or covered.
    pub fn over(path: PathBuf) -> Option<(Self, impl Sized + use<>)> {
        let file = SlowFile::new(&std::fs::read(&path).unwrap())?;
        let guard = (file.answer_at_the_end(), file.show_at(path));
        Some((file, guard))
    }

    /// Mounts this file over `path`, an existing file, until the returned guard is dropped.
    ///
    /// # Panics
    ///
    /// If it cannot be mounted.
    pub fn show_at(&self, path: PathBuf) -> impl Drop + use<> {
        struct Shown(PathBuf);
        impl Drop for Shown {
            fn drop(&mut self) {
                let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
            }
        }
        rustix::mount::mount_bind(self.path(), &path).unwrap();
        Shown(path)
    }

    /// Also holds back reads of these bytes.
    pub fn hold(&self, bytes: Range<u64>) {
        self.ask(&format!("hold {} {}", bytes.start, bytes.end));
    }

    /// Stops answering.
    pub fn fall_silent(&self) {
        self.ask("silent");
    }

    /// Also fails reads of these bytes.
    pub fn fail(&self, bytes: Range<u64>) {
        self.ask(&format!("fail {} {}", bytes.start, bytes.end));
    }

    /// Stops failing reads.
    pub fn recover(&self) {
        self.ask("recover");
    }

    /// Answers the requests held back, and all later ones.
    pub fn answer(&self) {
        self.ask("answer");
    }

    /// Returns the number of requests held back now.
    pub fn waiting(&self) -> usize {
        self.ask("waiting")
    }

    /// Returns a guard that releases all requests when it is dropped, so that a failing test can
    /// end.
    pub fn answer_at_the_end(&self) -> impl Drop + use<> {
        struct Guard(Arc<Mutex<Client>>);
        impl Drop for Guard {
            fn drop(&mut self) {
                let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                // The server may already have ended.
                let _ = client.ask("answer");
            }
        }
        Guard(self.server.clone())
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        let mut client = self.client();
        // Requests that still wait for it fail.
        let _ = client.process.kill();
        let _ = client.process.wait();
        drop(client);
        let mount = self.folder.path().join(MOUNT);
        let _ = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Serves the file of the test that started this process; does nothing in any other process.
///
/// # Panics
///
/// If the file system cannot be mounted.
pub fn serve() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    // Neither the process that waits for the file nor its server may outlive the other.
    let signal = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(signal)).unwrap();
    let content = std::fs::read(Path::new(&folder).join(CONTENT)).unwrap();
    let shared = Arc::new(Shared { content, state: Mutex::default() });
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("slow-file".into())];
    let mount = Path::new(&folder).join(MOUNT);
    let _session = match fuser::spawn_mount(Server(shared.clone()), mount, &config) {
        Ok(session) => session,
        Err(error) => return println!("{SAYS}{error}"),
    };
    for line in io::stdin().lines().map_while(Result::ok) {
        let words: Vec<_> = line.split(' ').collect();
        let range = || words[1].parse().unwrap()..words[2].parse().unwrap();
        match words[0] {
            "hold" => shared.state().held.push(range()),
            "fail" => shared.state().failing.push(range()),
            "silent" => shared.state().silent = true,
            "recover" => shared.state().failing.clear(),
            "answer" => answer(&shared),
            _ => {}
        }
        println!("{SAYS}{}", shared.state().waiting.len());
    }
}

fn answer(shared: &Shared) {
    let waiting = {
        let mut state = shared.state();
        state.held.clear();
        state.silent = false;
        std::mem::take(&mut state.waiting)
    };
    waiting.into_iter().for_each(|answer| answer());
}

struct Server(Arc<Shared>);

impl Server {
    /// Answers at once, or when the test permits it.
    fn respond(&self, held: impl FnOnce(&State) -> bool, answer: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state();
        if state.silent || held(&state) {
            state.waiting.push(Box::new(answer));
            return;
        }
        drop(state);
        answer();
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if Path::new(name) == Path::new(NAME) {
            reply.entry(&TTL, &self.0.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let attributes = self.0.attributes(inode);
        self.respond(|_| false, move || reply.attr(&TTL, &attributes));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Bypasses the page cache, and so avoids a read-ahead of neighbouring pages.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = (offset + u64::from(size)).min(self.0.content.len() as u64);
        let among = move |ranges: &[Range<u64>]| {
            ranges.iter().any(|range| offset < range.end && range.start < end)
        };
        let shared = self.0.clone();
        self.respond(
            move |state| among(&state.held),
            move || {
                if among(&shared.state().failing) {
                    return reply.error(Errno::EIO);
                }
                reply.data(shared.content.get(offset as usize..end as usize).unwrap_or_default());
            },
        );
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        // The kernel then treats the whole file as data.
        self.respond(|_| false, move || reply.error(Errno::ENOSYS));
    }
}
