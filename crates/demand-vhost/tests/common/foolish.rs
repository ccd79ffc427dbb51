// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The malicious back-end of the examples, run on a thread.

#[path = "../../examples/malicious/deed.rs"]
pub(crate) mod deed;
#[path = "../../examples/malicious/hostile.rs"]
pub(crate) mod hostile;
#[path = "../../examples/malicious/memory.rs"]
pub(crate) mod memory;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use deed::Deed;
use hostile::Connection;
use memory::Guarded;

pub(crate) struct Foolish {
    pub(crate) socket: PathBuf,
    _directory: tempfile::TempDir,
    mappings: std::sync::mpsc::Receiver<Arc<Mutex<Vec<Arc<Guarded>>>>>,
    thread: Option<JoinHandle<Vec<u32>>>,
}

impl Foolish {
    pub(crate) fn start(deed: Deed, protocol_features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, mappings) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut back_end = Connection::new(stream, deed, protocol_features);
            let _ = sender.send(back_end.mappings());
            back_end.serve()
        });
        Foolish { socket, _directory: directory, mappings, thread: Some(thread) }
    }

    /// Waits for a connection and returns the back-end's mappings of guest memory.
    pub(crate) fn mappings(&self) -> Vec<Arc<Guarded>> {
        self.mappings.recv().unwrap().lock().unwrap().clone()
    }

    /// Waits for the end of the connection and returns the requests received.
    pub(crate) fn requests(mut self) -> Vec<u32> {
        self.thread.take().unwrap().join().unwrap()
    }
}
