// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages between the source and its server: fixed sizes, little-endian numbers.
//!
//! The server begins with a [`Hello`]. Then the source sends [`Query`]s, as many as it likes, and
//! the server answers each with an [`Answer`] and its bytes, in any order.

/// The most bytes that one query may ask for. An answer is sent as a whole, and delays those behind
/// it.
pub(super) const MOST: u32 = 256 << 10;

const MAGIC: [u8; 8] = *b"DPPAGES1";

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    number.copy_from_slice(&bytes[at..at + N]);
    number
}

/// The server's first message: which image it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Bytes of the image.
    pub size: u64,
    /// Identifies the image's content: the source accepts no other after it has begun.
    pub image: [u8; 16],
}

impl Hello {
    /// Bytes of the message.
    pub const BYTES: usize = 32;

    /// Returns the message.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..].copy_from_slice(&self.image);
        bytes
    }

    /// Reads the message; `None` if the peer is not a page server.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let hello = Hello { size: u64::from_le_bytes(number(bytes, 8)), image: number(bytes, 16) };
        (bytes[..8] == MAGIC).then_some(hello)
    }
}

/// A request for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Repeated in the answer.
    pub tag: u64,
    /// Offset in the image, in bytes.
    pub offset: u64,
    /// Number of bytes.
    pub len: u32,
}

impl Query {
    /// Bytes of the message.
    pub const BYTES: usize = 20;

    /// Returns the message.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads the message.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Query {
            tag: u64::from_le_bytes(number(bytes, 0)),
            offset: u64::from_le_bytes(number(bytes, 8)),
            len: u32::from_le_bytes(number(bytes, 16)),
        }
    }
}

/// How a query went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The bytes follow.
    Bytes,
    /// The server's storage failed; a later query may succeed.
    Later,
    /// The query can never succeed.
    Never,
}

/// The head of an answer, which its bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The tag of the query.
    pub tag: u64,
    /// How it went.
    pub status: Status,
    /// Number of bytes that follow.
    pub len: u32,
}

impl Answer {
    /// Bytes of the message.
    pub const BYTES: usize = 16;

    /// Returns the message.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let status: u32 = match self.status {
            Status::Bytes => 0,
            Status::Later => 1,
            Status::Never => 2,
        };
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..12].copy_from_slice(&status.to_le_bytes());
        bytes[12..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads the message; `None` if its status is unknown.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let status = match u32::from_le_bytes(number(bytes, 8)) {
            0 => Status::Bytes,
            1 => Status::Later,
            2 => Status::Never,
            _ => return None,
        };
        let tag = u64::from_le_bytes(number(bytes, 0));
        Some(Answer { tag, status, len: u32::from_le_bytes(number(bytes, 12)) })
    }
}
