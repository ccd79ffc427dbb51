// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading of the server's replies: bytes go from the stream's buffer to their destination. By a
//! length that the server sent, at most 64 KiB are allocated, for an error's message.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use demand_source::to_usize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

use super::error::{Errno, NbdErrorKind, lost, one_line, violation};
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

/// Locks the requests in flight.
pub(crate) fn lock(flight: &Mutex<Flight>) -> MutexGuard<'_, Flight> {
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
mod tests;
