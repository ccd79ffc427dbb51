// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers and messages of the NBD protocol. All numbers on the wire are big-endian.

use std::ops::Range;

/// First number of a greeting.
pub(crate) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second number of a greeting, and first of an option.
pub(crate) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// First number of the reply to an option.
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Greeting flag: the server answers options that it does not know.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
/// Greeting flag: no zeros follow the answer to an export's name.
pub(crate) const NO_ZEROES: u16 = 2;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_STARTTLS: u32 = 5;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
/// Bit of replies that are errors.
pub(crate) const REP_ERROR: u32 = 1 << 31;

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

/// Export flag: the same bytes are seen through several connections.
pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;

/// The metadata context that tells zeros from data.
pub(crate) const ALLOCATION: &[u8] = b"base:allocation";
/// Flag of an extent in that context: it reads as zeros.
pub(crate) const STATE_ZERO: u32 = 2;

const REQUEST: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Flag of a structured reply: it is the last chunk.
pub(crate) const DONE: u16 = 1;
pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_DATA: u16 = 1;
pub(crate) const CHUNK_HOLE: u16 = 2;
pub(crate) const CHUNK_STATUS: u16 = 5;
/// Bit of chunks that are errors.
pub(crate) const CHUNK_ERROR: u16 = 1 << 15;

/// A command of the client.
#[derive(Clone, Copy, Debug)]
#[repr(u16)]
pub(crate) enum Command {
    Read = 0,
    Disconnect = 2,
    BlockStatus = 7,
}

/// Appends a request for a range. Its length fits in 32 bits, because the caller limits it.
pub(crate) fn request(out: &mut Vec<u8>, command: Command, cookie: u64, range: &Range<u64>) {
    let len = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
    out.extend(REQUEST.to_be_bytes());
    out.extend(0u16.to_be_bytes());
    out.extend((command as u16).to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(range.start.to_be_bytes());
    out.extend(len.to_be_bytes());
}
