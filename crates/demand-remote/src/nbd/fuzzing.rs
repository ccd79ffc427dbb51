// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Entry points for the fuzzer: arbitrary bytes in place of a server.

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use demand_source::{Chunk, Destination, Extent, Priority, Request, SourceError};

use super::extents::Extents;
use super::flight::{Flight, Work};
use super::handshake::{self, Blocks, Export, Mode};
use super::piece::{Geometry, Piece};
use super::reply;

/// Size of the export, in bytes.
const SIZE: u64 = 1 << 20;
/// Length of each read, in bytes.
const LEN: usize = 8192;

/// Runs a future that never waits, because all bytes of its stream are there.
fn run<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("the future waits, with all bytes before it"),
    }
}

/// Negotiates with a server that sends these bytes.
pub fn negotiation(bytes: &[u8]) {
    let mut stream = tokio::io::join(bytes, tokio::io::sink());
    let agreed = run(async {
        let zeros = handshake::greet(&mut stream).await?;
        handshake::agree(&mut stream, "vm7", zeros).await
    });
    if let Ok((export, _)) = agreed {
        // It must be usable, whatever the server says.
        let geometry = Geometry::new(&export);
        assert!(geometry.check(&export).is_ok() && geometry.most(Priority::Demand) >= 4096);
    }
}

/// Receives these bytes as replies to three reads (cookies 0 to 2; at 4096, 100 and the end of the
/// export) and a look-up of its extents (cookie 3; context 0).
///
/// # Panics
///
/// If a read succeeds without all of its bytes, or an extent is impossible.
pub fn replies(mut bytes: &[u8], structured: bool) {
    let mode = Mode { structured, allocation: structured.then_some(0) };
    let blocks = Blocks { least: 512, most: 1 << 20 };
    let geometry = Geometry::new(&Export { size: SIZE, blocks, several: true });
    let extents = Arc::new(Extents::new(SIZE, 512, true));
    let flight = Mutex::new(Flight::default());
    let mut outcomes = Vec::new();
    for offset in [4096, 100, SIZE - LEN as u64] {
        let (destination, content) = Destination::owned(vec![0; LEN]);
        let chunks = vec![Chunk { offset, destination }];
        let (pieces, completion) =
            Piece::all_of(Request { priority: Priority::Demand, chunks }, &geometry);
        for piece in pieces {
            reply::lock(&flight).add(Work::Read(piece));
        }
        outcomes.push((completion, content));
    }
    if let Some(query) = extents.look_ahead(0) {
        reply::lock(&flight).add(Work::Status(query));
    }
    while !bytes.is_empty() {
        match run(reply::receive(&mut bytes, &flight, mode)) {
            Err(_) => break,
            Ok(None) => {}
            Ok(Some((sent, failure))) => match (sent.work, failure) {
                (Work::Read(piece), None) => piece.succeed(),
                (Work::Status(query), None) => drop(query.succeed()),
                (work, Some(_)) => work.withdraw(),
            },
        }
    }
    drop(flight);
    for (completion, content) in outcomes {
        match completion.wait() {
            Ok(()) => assert!(content.take().is_ok(), "a success has all bytes"),
            Err(SourceError::Short { wrote, .. }) => panic!("a success with {wrote} bytes"),
            Err(_) => {}
        }
    }
    let mut at = 0;
    while let Some(extent) = extents.known(at).filter(|_| at < SIZE) {
        assert!(extent.end() > at && extent.end() <= SIZE, "{extent:?} at {at}");
        assert!(extent.end().is_multiple_of(4096), "{extent:?} at {at}");
        assert!(!matches!(extent, Extent::Hole { .. }) || at.is_multiple_of(4096));
        at = extent.end();
    }
}
