// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pager that serves a file, or the files of a folder by their names.
//!
//! usage: `pager PATH SOCKET [--staging] [--watch]`
//!
//! With `--staging`, answers are put into a memfd. With `--watch`, the number of missing pages is
//! printed when it changes, as read from the VMM's own bitmap.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Component, Path};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;
use std::{env, fs, thread};

use demand_pager::Calls;
use demand_pager::protocol::{Call, Fault, Greeting, MOST, NO_TAG, Reply, VERSION};
use demand_source::{Priority, Retry};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Faults that the staging area has room for.
const SLOTS: u64 = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let (options, paths): (Vec<_>, Vec<_>) =
        arguments.iter().partition(|argument| argument.starts_with("--"));
    let has = |option: &str| options.iter().any(|argument| *argument == option);
    let (staging, watch) = (has("--staging"), has("--watch"));
    let is_known = |option: &&String| matches!(option.as_str(), "--staging" | "--watch");
    let ([path, socket], true) = (&paths[..], options.iter().all(is_known)) else {
        return Err("usage: pager PATH SOCKET [--staging] [--watch]".into());
    };
    // Left by a pager that was killed.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    thread::scope(|scope| {
        loop {
            let (stream, _) = listener.accept()?;
            scope.spawn(move || {
                if let Err(error) = serve(&stream, Path::new(path), staging, watch) {
                    eprintln!("pager: {error}");
                }
            });
        }
    })
}

/// Opens the file, or the file of the folder that has the name.
fn open_image(path: &Path, name: &str) -> io::Result<File> {
    let file = if path.is_dir() {
        let inside = |part| matches!(part, Component::Normal(_));
        if !Path::new(name).components().all(inside) {
            return Err(io::Error::other("the name leaves the folder"));
        }
        File::open(path.join(name))?
    } else {
        File::open(path)?
    };
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a regular file"))
    }
}

/// Names the content of a file that is not changed: another file has another name.
fn identity(file: &File) -> io::Result<[u8; 16]> {
    let metadata = file.metadata()?;
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, metadata.dev(), metadata.ino(), metadata.len()).hash(&mut hasher);
        (metadata.mtime(), metadata.mtime_nsec()).hash(&mut hasher);
        hasher.finish().to_le_bytes()
    };
    let mut identity = [0; 16];
    identity[..8].copy_from_slice(&half(0));
    identity[8..].copy_from_slice(&half(1));
    Ok(identity)
}

fn serve(stream: &UnixStream, path: &Path, with_staging: bool, watches: bool) -> io::Result<()> {
    let mut calls = Calls::new(stream);
    let mut replies = stream;
    let refused = |text: String| Reply::Error { tag: NO_TAG, retry: Retry::Never, text }.encode();
    let name = match calls.receive()? {
        Some((Call::Handshake { version: VERSION, name }, _)) => name,
        _ => {
            let text = format!("this pager speaks version {VERSION} of the protocol only");
            return replies.write_all(&refused(text));
        }
    };
    let image = match open_image(path, &name) {
        Ok(image) => image,
        Err(error) => {
            return replies.write_all(&refused(format!("it has no image '{name}': {error}")));
        }
    };
    let staging = with_staging.then(create_staging).transpose()?;
    let greeting = Reply::Handshake(Greeting {
        version: VERSION,
        size: image.metadata()?.len(),
        staging: staging.as_ref().map(|_| SLOTS * MOST as u64),
        watches,
        generation: identity(&image)?,
    });
    send(stream, &greeting.encode(), staging.as_ref())?;
    let free = if staging.is_some() { (0..SLOTS).collect() } else { Vec::new() };
    let state = State { free, ..State::default() };
    let pager = Pager { image, staging, state: Mutex::new(state), changed: Condvar::new() };
    thread::scope(|scope| {
        let answering = scope.spawn(|| pager.answer_all(stream));
        if watches {
            scope.spawn(|| pager.watch());
        }
        let outcome = pager.receive_all(&mut calls);
        pager.with(|state| state.closed = true);
        answering.join().unwrap_or(Ok(())).and(outcome)
    })
}

/// Returns the number of bits that are set in a bitmap.
fn count_ones(bitmap: &File) -> io::Result<u64> {
    let mut bytes = vec![0; usize::try_from(bitmap.metadata()?.len()).unwrap_or(0)];
    bitmap.read_exact_at(&mut bytes, 0)?;
    Ok(bytes.iter().map(|byte| u64::from(byte.count_ones())).sum())
}

fn create_staging() -> io::Result<File> {
    let staging = File::from(memfd_create("staging", MemfdFlags::CLOEXEC)?);
    staging.set_len(SLOTS * MOST as u64)?;
    Ok(staging)
}

/// Sends a message, with a file if there is one.
fn send(mut stream: &UnixStream, bytes: &[u8], file: Option<&File>) -> io::Result<()> {
    let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&bytes[sent..])
}

/// The faults of a connection: one thread receives them, another one answers.
struct Pager {
    image: File,
    staging: Option<File>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The bitmaps of the VMM's regions.
    bitmaps: Vec<File>,
    demand: VecDeque<Fault>,
    fill: VecDeque<Fault>,
    closed: bool,
    /// Unused parts of the staging area.
    free: Vec<u64>,
    /// The parts whose bytes have not been released, by tag.
    used: HashMap<u64, u64>,
}

impl Pager {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let outcome = act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
        outcome
    }

    fn receive_all(&self, calls: &mut Calls<'_>) -> io::Result<()> {
        while let Some((call, file)) = calls.receive()? {
            self.with(|state| match call {
                Call::Handshake { .. } => {}
                Call::Fault(fault) => match fault.priority {
                    Priority::Demand => state.demand.push_back(fault),
                    Priority::Fill => state.fill.push_back(fault),
                },
                Call::Raise(tag) => {
                    let at = state.fill.iter().position(|fault| fault.tag == tag);
                    state.demand.extend(at.and_then(|at| state.fill.remove(at)));
                }
                Call::Release(tag) => state.free.extend(state.used.remove(&tag)),
                Call::Missing { .. } => state.bitmaps.extend(file),
            });
        }
        Ok(())
    }

    /// Prints the number of missing pages when it changes, until the VMM is gone. A pager with a
    /// cache would drop the pages that the VMM has.
    fn watch(&self) {
        let mut before = None;
        while !self.with(|state| state.closed) {
            let missing = self.with(|state| {
                let missing = state.bitmaps.iter().map(count_ones).sum::<io::Result<u64>>();
                if state.bitmaps.is_empty() { None } else { missing.ok() }
            });
            // A bitmap that cannot be read says nothing.
            if let Some(missing) = missing.filter(|missing| before != Some(*missing)) {
                before = Some(missing);
                println!("{missing} pages are missing");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn answer_all(&self, mut stream: &UnixStream) -> io::Result<()> {
        while let Some(fault) = self.next() {
            stream.write_all(&self.answer(fault).encode())?;
        }
        Ok(())
    }

    /// Waits for the next fault: demand before fill. Returns `None` when the VMM is gone.
    fn next(&self) -> Option<Fault> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.closed {
            if let Some(fault) = state.demand.pop_front().or_else(|| state.fill.pop_front()) {
                return Some(fault);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn answer(&self, fault: Fault) -> Reply {
        let Fault { tag, offset, len, .. } = fault;
        let failed = |error: io::Error| {
            let text = format!("{error}; check the pager's storage");
            Reply::Error { tag, retry: Retry::Later, text }
        };
        let mut bytes = vec![0; MOST.min(len as usize)];
        if let Err(error) = self.image.read_exact_at(&mut bytes, offset) {
            return failed(error);
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Reply::Zero { tag };
        }
        let Some(staging) = &self.staging else { return Reply::Data { tag, bytes } };
        let Some(slot) = self.with(|state| state.free.pop()) else {
            return Reply::Data { tag, bytes };
        };
        let offset = slot * MOST as u64;
        match staging.write_all_at(&bytes, offset) {
            Ok(()) => {
                self.with(|state| state.used.insert(tag, slot));
                Reply::Staged { tag, offset }
            }
            Err(error) => failed(error),
        }
    }
}
