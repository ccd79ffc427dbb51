// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of a negotiation, and the server's replies to them.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::{NbdErrorKind, Refusal, lost, one_line, violation};
use super::handshake::Blocks;
use super::protocol::{
    CAN_MULTI_CONN, INFO_BLOCK_SIZE, INFO_EXPORT, OPTION, OPTION_REPLY, REP_ACK, REP_ERROR,
};

/// Longest reply to an option, in bytes. The protocol's strings have at most 4096.
const LONGEST_REPLY: u32 = 64 << 10;
/// Largest least block size that the protocol allows, in bytes.
const LARGEST_LEAST: u32 = 64 << 10;

/// Information about an export.
pub(super) enum Info {
    Export { size: u64, several: bool },
    Blocks(Blocks),
    Other,
}

impl Info {
    pub(super) fn parse(data: &[u8]) -> Result<Info, NbdErrorKind> {
        let Some((kind, rest)) = data.split_first_chunk() else {
            return violation("its information about the export has no type");
        };
        match u16::from_be_bytes(*kind) {
            INFO_EXPORT => {
                let (Some((size, flags)), 10) = (rest.split_first_chunk(), rest.len()) else {
                    return violation("its description of the export has a wrong length");
                };
                let flags = u16::from_be_bytes([flags[0], flags[1]]);
                let several = flags & CAN_MULTI_CONN != 0;
                Ok(Info::Export { size: u64::from_be_bytes(*size), several })
            }
            INFO_BLOCK_SIZE => {
                let Ok([a, b, c, d, _, _, _, _, e, f, g, h]) = <[u8; 12]>::try_from(rest) else {
                    return violation("its block sizes have a wrong length");
                };
                let least = u32::from_be_bytes([a, b, c, d]);
                let most = u32::from_be_bytes([e, f, g, h]);
                // With room for a page of any alignment.
                let fits = least.is_power_of_two()
                    && least <= LARGEST_LEAST
                    && most / 4 >= least
                    && most >= 16 << 10;
                if !fits {
                    return violation("its block sizes are impossible");
                }
                Ok(Info::Blocks(Blocks { least, most }))
            }
            _ => Ok(Info::Other),
        }
    }
}

/// A reply to an option.
pub(super) enum Reply {
    Ack,
    Refused { refusal: Refusal, message: String },
    Other { kind: u32, data: Vec<u8> },
}

pub(super) async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    data: &[u8],
) -> Result<(), NbdErrorKind> {
    let mut bytes = OPTION.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(string(data));
    let sent = match stream.write_all(&bytes).await {
        Ok(()) => stream.flush().await,
        error => error,
    };
    match sent {
        Ok(()) => Ok(()),
        // A server that refuses a certificate says so, and is gone when the next message is sent.
        Err(error) => match stream.read_u8().await {
            Err(said) if said.kind() == io::ErrorKind::InvalidData => Err(lost(said)),
            _ => Err(lost(error)),
        },
    }
}

pub(super) async fn receive<S: AsyncRead + Unpin>(
    stream: &mut S,
    option: u32,
) -> Result<Reply, NbdErrorKind> {
    if stream.read_u64().await.map_err(lost)? != OPTION_REPLY {
        return violation("it answers an option with something else");
    }
    if stream.read_u32().await.map_err(lost)? != option {
        return violation("it answers another option");
    }
    let kind = stream.read_u32().await.map_err(lost)?;
    let len = stream.read_u32().await.map_err(lost)?;
    if len > LONGEST_REPLY {
        return violation("its answer to an option is too long");
    }
    let mut data = vec![0; demand_source::to_usize(len.into())];
    stream.read_exact(&mut data).await.map_err(lost)?;
    Ok(match kind {
        REP_ACK if data.is_empty() => Reply::Ack,
        REP_ACK => return violation("its acknowledgement has data"),
        kind if kind & REP_ERROR != 0 => {
            Reply::Refused { refusal: refusal(kind), message: one_line(&data) }
        }
        kind => Reply::Other { kind, data },
    })
}

fn refusal(kind: u32) -> Refusal {
    match kind & !REP_ERROR {
        1 => Refusal::Unsupported,
        2 => Refusal::Policy,
        3 => Refusal::Invalid,
        4 => Refusal::Platform,
        5 => Refusal::TlsRequired,
        6 => Refusal::UnknownExport,
        7 => Refusal::ShuttingDown,
        8 => Refusal::BlockSizes,
        9 => Refusal::TooBig,
        other => Refusal::Other(other),
    }
}

/// Returns a string in the protocol's form, its length before it. A client's strings are short.
pub(super) fn string(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes()[..], bytes].concat()
}
