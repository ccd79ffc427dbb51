// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pagers that do as a test wants.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use demand_pager::protocol::{Call, Fault, Greeting, Reply, VERSION};
use demand_pager::{Location, PagerError, PagerOptions, PagerSource};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;

/// Size of the image, in bytes.
pub(crate) const SIZE: u64 = 4 << 20;

/// A pager in this process. Its threads end with their connections.
pub(crate) struct Fake {
    folder: TempDir,
    connections: Arc<AtomicUsize>,
}

impl Fake {
    /// Starts a pager that serves each connection by `serve`, after the VMM's handshake.
    pub(crate) fn start(
        serve: impl Fn(&mut UnixStream) -> io::Result<()> + Clone + Send + 'static,
    ) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let fake = Fake { folder, connections: Arc::default() };
        let connections = fake.connections.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, serve) = (stream.unwrap(), serve.clone());
                connections.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || match Call::read(&mut stream) {
                    Ok(Some(Call::Handshake { version: VERSION, .. })) => serve(&mut stream),
                    other => panic!("no handshake: {other:?}"),
                });
            }
        });
        fake
    }

    pub(crate) fn open(&self, options: PagerOptions) -> Result<PagerSource, PagerError> {
        PagerSource::open(&Location::new(self.folder.path().join("socket"), "vm7"), options)
    }

    /// Returns the number of connections that were made.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Returns a proper greeting without a staging area.
pub(crate) fn greeting() -> Greeting {
    Greeting { version: VERSION, size: SIZE, staging: None, watches: false, generation: [7; 16] }
}

/// Sends a greeting, with a file.
pub(crate) fn greet(
    stream: &mut UnixStream,
    greeting: Greeting,
    files: &[&File],
) -> io::Result<()> {
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    let bytes = Reply::Handshake(greeting).encode();
    sendmsg(&*stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Reads the next fault, and skips other messages.
pub(crate) fn fault(stream: &mut UnixStream) -> io::Result<Fault> {
    loop {
        match Call::read(stream)? {
            Some(Call::Fault(fault)) => return Ok(fault),
            Some(_) => {}
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Answers a fault with bytes that are all 7.
pub(crate) fn sevens(stream: &mut UnixStream, fault: Fault) -> io::Result<()> {
    let bytes = vec![7; fault.len as usize];
    stream.write_all(&Reply::Data { tag: fault.tag, bytes }.encode())
}
