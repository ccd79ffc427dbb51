// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page server: answers queries from any source of pages, in the order in which it delivers.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use demand_source::{
    Chunk, Destination, OwnedBytes, PageSource, Priority, Request, Retry, SourceError,
};

use super::protocol::{Answer, Hello, MOST, Query, Status};

/// Serves `image`, whose content `id` identifies, to all who connect. Returns only if the listener
/// fails.
///
/// # Errors
///
/// The listener's error.
pub fn serve(listener: &TcpListener, image: &Arc<dyn PageSource>, id: [u8; 16]) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        let image = image.clone();
        thread::spawn(move || {
            // The peer is gone, or talks nonsense: its connection ends, and the others stay.
            let _ = converse(stream, &*image, id);
        });
    }
}

fn converse(mut stream: TcpStream, image: &dyn PageSource, id: [u8; 16]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(&Hello { size: image.size(), image: id }.encode())?;
    let answers = Arc::new(Mutex::new(stream.try_clone()?));
    loop {
        let mut query = [0; Query::BYTES];
        stream.read_exact(&mut query)?;
        let Query { tag, offset, len } = Query::decode(&query);
        let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= image.size());
        if !inside || len > MOST {
            reply(&answers, tag, Status::Never, &[])?;
            continue;
        }
        let (destination, bytes) = Destination::owned(vec![0; len as usize]);
        let chunks = vec![Chunk { offset, destination }];
        let answers = answers.clone();
        // The next query is read while the image works on this one.
        image.submit(Request { priority: Priority::Demand, chunks }).then(move |outcome| {
            let _ = match content(outcome, bytes) {
                Ok(bytes) => reply(&answers, tag, Status::Bytes, &bytes),
                Err(Retry::Later) => reply(&answers, tag, Status::Later, &[]),
                Err(Retry::Never) => reply(&answers, tag, Status::Never, &[]),
            };
        });
    }
}

fn content(outcome: Result<(), SourceError>, bytes: OwnedBytes) -> Result<Vec<u8>, Retry> {
    outcome.and_then(|()| bytes.take()).map_err(|error| {
        eprintln!("tcp-pages: {error}");
        error.retry()
    })
}

fn reply(answers: &Mutex<TcpStream>, tag: u64, status: Status, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).expect("at most MOST bytes");
    let mut stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
    stream.write_all(&Answer { tag, status, len }.encode())?;
    stream.write_all(bytes)
}
