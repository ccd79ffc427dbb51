// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading of the server's replies: bytes go from the stream's buffer to their destination. By a
//! length that the server sent, at most 64 KiB are allocated, for an error's message.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use demand_source::to_usize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

use super::error::{Errno, NbdErrorKind, one_line};
use super::flight::{Flight, Sent, Work};
use super::handshake::Mode;
use super::protocol::{
    CHUNK_DATA, CHUNK_ERROR, CHUNK_HOLE, CHUNK_NONE, CHUNK_STATUS, DONE, SIMPLE_REPLY, STATE_ZERO,
    STRUCTURED_REPLY,
};

/// Longest chunk that is an error, in bytes.
const LONGEST_ERROR: u32 = 64 << 10;
/// Longest chunk of extents, in bytes: a million of them.
const LONGEST_STATUS: u32 = 4 + (8 << 20);
/// Zeros for holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A request whose reply is complete, with the server's error.
pub(crate) type Finished = (Sent, Option<NbdErrorKind>);

fn violation<T>(what: &'static str) -> Result<T, NbdErrorKind> {
    Err(NbdErrorKind::Protocol { what })
}

fn lost(source: io::Error) -> NbdErrorKind {
    NbdErrorKind::Lost { source }
}

fn lock(flight: &Mutex<Flight>) -> MutexGuard<'_, Flight> {
    flight.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives one simple reply, or one chunk of a structured reply. Returns the request that it
/// completes, if any.
///
/// # Errors
///
/// The stream's error, and every violation of the protocol. The connection is unusable then.
pub(crate) async fn receive<R: AsyncBufRead + Unpin>(
    input: &mut R,
    flight: &Mutex<Flight>,
    mode: Mode,
) -> Result<Option<Finished>, NbdErrorKind> {
    let (cookie, done) = match input.read_u32().await.map_err(lost)? {
        SIMPLE_REPLY => simple(input, flight, mode).await?,
        STRUCTURED_REPLY if mode.structured => chunk(input, flight, mode).await?,
        _ => return violation("it sends something that is no reply"),
    };
    if !done {
        return Ok(None);
    }
    let mut flight = lock(flight);
    let failure = flight.get(cookie)?.check()?;
    Ok(flight.remove(cookie).map(|sent| (sent, failure)))
}

async fn simple<R: AsyncBufRead + Unpin>(
    input: &mut R,
    flight: &Mutex<Flight>,
    mode: Mode,
) -> Result<(u64, bool), NbdErrorKind> {
    let error = input.read_u32().await.map_err(lost)?;
    let cookie = input.read_u64().await.map_err(lost)?;
    let range = {
        let mut flight = lock(flight);
        let sent = flight.get(cookie)?;
        if error != 0 {
            sent.fail(Errno(error), String::new());
            return Ok((cookie, true));
        }
        match &sent.work {
            Work::Read(_) if mode.structured => {
                return violation("it answers a read without structure, which was agreed on");
            }
            Work::Status(_) => return violation("it answers a look-up of extents without extents"),
            Work::Read(piece) => piece.range.clone(),
        }
    };
    data(input, flight, cookie, range.start, range.end - range.start).await?;
    Ok((cookie, true))
}

async fn chunk<R: AsyncBufRead + Unpin>(
    input: &mut R,
    flight: &Mutex<Flight>,
    mode: Mode,
) -> Result<(u64, bool), NbdErrorKind> {
    let flags = input.read_u16().await.map_err(lost)?;
    let kind = input.read_u16().await.map_err(lost)?;
    let cookie = input.read_u64().await.map_err(lost)?;
    let len = input.read_u32().await.map_err(lost)?;
    let done = flags & DONE != 0;
    lock(flight).get(cookie)?.count()?;
    match kind {
        CHUNK_NONE if done && len == 0 => {}
        CHUNK_DATA if len > 8 => {
            let offset = input.read_u64().await.map_err(lost)?;
            data(input, flight, cookie, offset, u64::from(len) - 8).await?;
        }
        CHUNK_HOLE if len == 12 => {
            let offset = input.read_u64().await.map_err(lost)?;
            let len = input.read_u32().await.map_err(lost)?;
            hole(&mut lock(flight), cookie, offset, len.into())?;
        }
        CHUNK_STATUS if (12..=LONGEST_STATUS).contains(&len) && len % 8 == 4 => {
            status(input, flight, mode, cookie, len / 8).await?;
        }
        kind if kind & CHUNK_ERROR != 0 && (6..=LONGEST_ERROR).contains(&len) => {
            let (error, message) = failure(input, len).await?;
            lock(flight).get(cookie)?.fail(error, message);
        }
        CHUNK_NONE | CHUNK_DATA | CHUNK_HOLE | CHUNK_STATUS => {
            return violation("it sends a chunk of a wrong length");
        }
        _ => return violation("it sends a chunk of an unknown type, or too long an error"),
    }
    Ok((cookie, done))
}

/// Receives the bytes of a range.
async fn data<R: AsyncBufRead + Unpin>(
    input: &mut R,
    flight: &Mutex<Flight>,
    cookie: u64,
    offset: u64,
    len: u64,
) -> Result<(), NbdErrorKind> {
    lock(flight).get(cookie)?.accept(offset, len)?;
    let mut done = 0;
    while done < len {
        let bytes = input.fill_buf().await.map_err(lost)?;
        if bytes.is_empty() {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
        let count = bytes.len().min(to_usize(len - done));
        // The lock is contended only when the source ends.
        lock(flight).get(cookie)?.write(offset + done, &bytes[..count]);
        input.consume(count);
        done += count as u64;
    }
    Ok(())
}

fn hole(flight: &mut Flight, cookie: u64, offset: u64, len: u64) -> Result<(), NbdErrorKind> {
    let sent = flight.get(cookie)?;
    sent.accept(offset, len)?;
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ZEROS.len() as u64);
        sent.write(offset + done, &ZEROS[..to_usize(count)]);
        done += count;
    }
    Ok(())
}

/// Receives the extents of a range.
async fn status<R: AsyncBufRead + Unpin>(
    input: &mut R,
    flight: &Mutex<Flight>,
    mode: Mode,
    cookie: u64,
    count: u32,
) -> Result<(), NbdErrorKind> {
    if Some(input.read_u32().await.map_err(lost)?) != mode.allocation {
        return violation("it sends extents of a metadata context that was not asked for");
    }
    lock(flight).get(cookie)?.answer()?;
    for _ in 0..count {
        let len = input.read_u32().await.map_err(lost)?;
        let flags = input.read_u32().await.map_err(lost)?;
        if len == 0 {
            return violation("it sends an extent without bytes");
        }
        if let Work::Status(query) = &mut lock(flight).get(cookie)?.work {
            query.add(len, flags & STATE_ZERO != 0);
        }
    }
    Ok(())
}

/// Receives an error.
async fn failure<R: AsyncBufRead + Unpin>(
    input: &mut R,
    len: u32,
) -> Result<(Errno, String), NbdErrorKind> {
    let error = input.read_u32().await.map_err(lost)?;
    let message_len = input.read_u16().await.map_err(lost)?;
    let mut rest = vec![0; to_usize(u64::from(len) - 6)];
    input.read_exact(&mut rest).await.map_err(lost)?;
    match rest.get(..usize::from(message_len)) {
        Some(message) if error != 0 => Ok((Errno(error), one_line(message))),
        Some(_) => violation("it sends an error that is none"),
        None => violation("it sends an error whose message is cut"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::extents::Extents;
    use crate::nbd::handshake::{Blocks, Export};
    use crate::nbd::piece::{Geometry, Piece};
    use crate::runtime;
    use demand_source::{
        Chunk, Completion, Destination, Extent, OwnedBytes, Priority, Request, SourceError,
    };
    use proptest::prelude::*;
    use std::sync::Arc;

    const STRUCTURED: Mode = Mode { structured: true, allocation: Some(7) };
    const LEN: usize = 8192;

    /// A flight with a read of two pages at 4096 (cookie 0), and a look-up from 0 (cookie 1).
    struct Asked {
        flight: Mutex<Flight>,
        bytes: OwnedBytes,
        completion: Completion,
        extents: Arc<Extents>,
    }

    fn asked() -> Asked {
        let blocks = Blocks { least: 1, most: 1 << 20 };
        let geometry = Geometry::new(&Export { size: 1 << 20, blocks, several: true });
        let (destination, bytes) = Destination::owned(vec![9; LEN]);
        let chunks = vec![Chunk { offset: 4096, destination }];
        let request = Request { priority: Priority::Demand, chunks };
        let (pieces, completion) = Piece::all_of(request, &geometry);
        let extents = Arc::new(Extents::new(1 << 20, 1, true));
        let mut flight = Flight::default();
        for piece in pieces {
            flight.add(Work::Read(piece));
        }
        flight.add(Work::Status(extents.look_ahead(0).unwrap()));
        Asked { flight: Mutex::new(flight), bytes, completion, extents }
    }

    /// Receives replies until the bytes end.
    fn receive_all(mut bytes: &[u8], asked: &Asked, mode: Mode) -> Result<(), NbdErrorKind> {
        while !bytes.is_empty() {
            let received = runtime::wait(receive(&mut bytes, &asked.flight, mode))?;
            match received {
                None => {}
                Some((Sent { work: Work::Read(piece), .. }, None)) => piece.succeed(),
                Some((Sent { work: Work::Read(piece), .. }, Some(_))) => {
                    piece.fail(SourceError::Withdrawn);
                }
                Some((Sent { work: Work::Status(query), .. }, _)) => drop(query.succeed()),
            }
        }
        Ok(())
    }

    fn chunk_of(done: bool, kind: u16, cookie: u64, payload: &[&[u8]]) -> Vec<u8> {
        let payload = payload.concat();
        let mut bytes = STRUCTURED_REPLY.to_be_bytes().to_vec();
        bytes.extend(u16::from(done).to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn data_of(done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
        chunk_of(done, CHUNK_DATA, 0, &[&offset.to_be_bytes(), bytes])
    }

    fn hole_of(done: bool, offset: u64, len: u32) -> Vec<u8> {
        chunk_of(done, CHUNK_HOLE, 0, &[&offset.to_be_bytes(), &len.to_be_bytes()])
    }

    fn status_of(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let mut payload = context.to_be_bytes().to_vec();
        for (len, flags) in extents {
            payload.extend(len.to_be_bytes());
            payload.extend(flags.to_be_bytes());
        }
        chunk_of(true, CHUNK_STATUS, 1, &[&payload])
    }

    fn error_of(kind: u16, error: u32, message_len: u16, rest: &[u8]) -> Vec<u8> {
        let kind = CHUNK_ERROR | kind;
        chunk_of(true, kind, 0, &[&error.to_be_bytes(), &message_len.to_be_bytes(), rest])
    }

    fn simple_of(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = SIMPLE_REPLY.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn chunks_arrive_in_any_order() {
        let asked = asked();
        let replies = [
            data_of(false, 4096 + 5000, &[2; LEN - 5000]),
            status_of(7, &[(4096, 0), (1 << 30, 3)]),
            hole_of(false, 4096 + 100, 4900),
            data_of(false, 4096, &[1; 100]),
            chunk_of(true, CHUNK_NONE, 0, &[]),
        ];
        receive_all(&replies.concat(), &asked, STRUCTURED).unwrap();
        asked.completion.wait().unwrap();
        let bytes = asked.bytes.take().unwrap();
        assert_eq!(bytes, [&[1; 100][..], &[0; 4900], &[2; LEN - 5000]].concat());
        assert_eq!(asked.extents.known(4096), Some(Extent::Hole { end: 1 << 20 }));
    }

    #[test]
    fn simple_reply_fills_its_destination() {
        let asked = asked();
        let mode = Mode::default();
        receive_all(&simple_of(0, 0, &[3; LEN]), &asked, mode).unwrap();
        asked.completion.wait().unwrap();
        assert_eq!(asked.bytes.take().unwrap(), [3; LEN]);
    }

    #[test]
    fn errors_of_the_server_are_named() {
        let offset = 4096u64.to_be_bytes();
        for (mode, reply, text) in [
            (Mode::default(), simple_of(5, 0, &[]), "EIO"),
            (STRUCTURED, simple_of(12, 0, &[]), "ENOMEM"),
            (STRUCTURED, error_of(1, 22, 3, b"a\nb"), "EINVAL"),
            (STRUCTURED, error_of(1, 22, 3, b"a\nb"), "says: a\\nb"),
            (STRUCTURED, error_of(2, 108, 4, &[b"bye!", &offset[..]].concat()), "says: bye!"),
            (STRUCTURED, error_of(77, 1234, 0, &[]), "error 1234; see its log"),
        ] {
            let asked = asked();
            let reply = [data_of(false, 4096, &[1; 4096]), reply].concat();
            let mut input = &reply[if mode.structured { 0 } else { reply.len() - 16 }..];
            let finished = loop {
                let received = runtime::wait(receive(&mut input, &asked.flight, mode)).unwrap();
                if let Some(finished) = received {
                    break finished;
                }
            };
            let error = finished.1.unwrap().to_string();
            assert!(error.contains(text) && error.contains("8192 bytes at offset 4096"), "{error}");
        }
    }

    #[test]
    fn violations_end_the_connection() {
        let many = (0..2 * LEN as u64).map(|_| data_of(false, 4096, &[1])).collect::<Vec<_>>();
        let singles = (0..LEN as u64).map(|at| data_of(false, 4096 + at, &[1])).collect::<Vec<_>>();
        let (zero, one) = (0u32.to_be_bytes(), 1u32.to_be_bytes());
        for (what, reply) in [
            ("no reply", vec![0; 4]),
            ("not made", simple_of(0, 5, &[])),
            ("not made", chunk_of(true, CHUNK_NONE, u64::MAX, &[])),
            ("without structure", simple_of(0, 0, &[1; LEN])),
            ("without extents", simple_of(0, 1, &[])),
            ("before it is whole", data_of(true, 4096, &[1; LEN - 1])),
            ("before it is whole", chunk_of(true, CHUNK_NONE, 0, &[])),
            ("before it is whole", chunk_of(true, CHUNK_NONE, 1, &[])),
            ("outside the range", data_of(true, 4095, &[1; 2])),
            ("outside the range", data_of(true, 4097, &[1; LEN])),
            ("outside the range", data_of(true, u64::MAX, &[1; LEN])),
            ("outside the range", hole_of(true, 4096, u32::MAX)),
            ("outside the range", hole_of(true, u64::MAX, 1)),
            ("twice", many.concat()),
            ("twice", [data_of(false, 4100, &[1; 2]), hole_of(true, 4096, 5)].concat()),
            ("too many chunks", singles.concat()),
            ("without bytes", hole_of(true, 4096, 0)),
            ("wrong length", data_of(true, 4096, &[])),
            ("wrong length", chunk_of(true, CHUNK_DATA, 0, &[&[1; 3]])),
            ("wrong length", chunk_of(true, CHUNK_HOLE, 0, &[&[1; 11]])),
            ("wrong length", chunk_of(true, CHUNK_NONE, 0, &[&[1]])),
            ("wrong length", chunk_of(false, CHUNK_NONE, 0, &[])),
            ("wrong length", chunk_of(true, CHUNK_STATUS, 1, &[&[1; 4]])),
            ("wrong length", chunk_of(true, CHUNK_STATUS, 1, &[&[1; 13]])),
            ("unknown type", chunk_of(true, 99, 0, &[&[1; 13]])),
            ("too long an error", chunk_of(true, CHUNK_ERROR, 0, &[&[1; 5]])),
            ("too long an error", chunk_of(true, CHUNK_ERROR | 1, 0, &[&[1; 70_000]])),
            ("that is none", error_of(1, 0, 0, &[])),
            ("is cut", error_of(1, 5, 4, b"abc")),
            ("not asked for", status_of(8, &[(4096, 0)])),
            ("extent without", status_of(7, &[(4096, 0), (0, 2)])),
            ("with extents", chunk_of(true, CHUNK_STATUS, 0, &[&7u32.to_be_bytes(), &one, &zero])),
            ("with data", chunk_of(true, CHUNK_DATA, 1, &[&[0; 20]])),
            (
                "extents twice",
                [
                    chunk_of(false, CHUNK_STATUS, 1, &[&7u32.to_be_bytes(), &one, &zero]),
                    status_of(7, &[(4096, 0)]),
                ]
                .concat(),
            ),
        ] {
            let error = receive_all(&reply, &asked(), STRUCTURED).unwrap_err();
            let violation = matches!(error, NbdErrorKind::Protocol { .. });
            assert!(violation && error.to_string().contains(what), "{what}: {error}");
        }
        let structured = data_of(true, 4096, &[1; LEN]);
        let error = receive_all(&structured, &asked(), Mode::default()).unwrap_err();
        assert!(error.to_string().contains("no reply"), "{error}");
    }

    #[test]
    fn cut_replies_complete_nothing() {
        let whole = [data_of(false, 4096, &[1; 4096]), hole_of(true, 8192, 4096)].concat();
        for len in 1..whole.len() {
            let asked = asked();
            if len == 28 + 4096 {
                continue; // The first chunk is whole.
            }
            let error = receive_all(&whole[..len], &asked, STRUCTURED).unwrap_err();
            assert!(matches!(error, NbdErrorKind::Lost { .. }), "{len}: {error}");
            drop(asked.flight);
            assert!(matches!(asked.completion.wait(), Err(SourceError::Abandoned)));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_replies_are_no_panic(
            replies in prop::collection::vec(
                (any::<bool>(), 0..7u16, any::<bool>(), 0..3u64, prop::collection::vec(any::<u8>(), 0..40)),
                0..20,
            ),
            structured: bool,
        ) {
            let asked = asked();
            let mut bytes = Vec::new();
            for (done, kind, error, cookie, mut payload) in replies {
                // Most offsets are near.
                payload.iter_mut().take(6).for_each(|byte| *byte = 0);
                let kind = if error { kind | CHUNK_ERROR } else { kind };
                bytes.extend(chunk_of(done, kind, cookie, &[&payload]));
            }
            let mode = Mode { structured, allocation: Some(0) };
            let _ = receive_all(&bytes, &asked, mode);
        }
    }
}
