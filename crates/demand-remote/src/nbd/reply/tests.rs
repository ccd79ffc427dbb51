// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of replies: whole, cut, in any order, and wrong ones.

use super::*;
use crate::nbd::extents::Extents;
use crate::nbd::fuzzing;
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
            (any::<bool>(), 0..7u16, any::<bool>(), 0..5u64, prop::collection::vec(0..=255u8, 0..40)),
            0..20,
        ),
        structured: bool,
    ) {
        let mut bytes = Vec::new();
        for (done, kind, error, cookie, mut payload) in replies {
            // Most offsets are near.
            payload.iter_mut().take(6).for_each(|byte| *byte = 0);
            let kind = if error { kind | CHUNK_ERROR } else { kind };
            bytes.extend(chunk_of(done, kind, cookie, &[&payload]));
        }
        fuzzing::replies(&bytes, structured);
    }
}
