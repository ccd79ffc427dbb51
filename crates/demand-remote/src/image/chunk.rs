// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stored chunks: the hashes of their pages, and one frame.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use demand_source::{page_hash, to_usize};
use zstd::bulk::{Compressor, Decompressor};

use super::error::LayoutError;
use super::layout::PAGE;

/// Bytes of a page.
const PAGE_LEN: usize = to_usize(PAGE);
/// Bytes of a page's hash.
const HASH: usize = 8;

/// Returns the length of the hashes of a chunk with so many bytes of content.
pub(crate) fn hash_bytes(content: usize) -> usize {
    content / PAGE_LEN * HASH
}

/// The coding of a stored frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// The content itself.
    None,
    /// One LZ4 block, without a frame around it.
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl Coding {
    /// Returns the number that stands for the coding.
    pub(crate) fn number(self) -> u8 {
        match self {
            Coding::None => 0,
            Coding::Lz4 => 1,
            Coding::Zstd => 2,
        }
    }

    /// Returns the coding that a number stands for.
    pub(crate) fn of_number(number: u8) -> Option<Self> {
        [Coding::None, Coding::Lz4, Coding::Zstd].into_iter().find(|it| it.number() == number)
    }
}

/// The levels of zstd.
pub(crate) const LEVELS: std::ops::RangeInclusive<i32> = 1..=22;

/// How a push compresses chunks. A chunk that becomes less than 5 % shorter is stored as it is.
///
/// The text of each is `none`, `lz4`, or `zstd:LEVEL` with a level from 1 to 22.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// With LZ4, which decompresses soonest.
    Lz4,
    /// With zstd at this level, from 1 to 22.
    Zstd(i32),
}

impl Default for Compression {
    /// Returns zstd at level 3.
    fn default() -> Self {
        Compression::Zstd(3)
    }
}

impl FromStr for Compression {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "none" => Ok(Compression::None),
            None if text == "lz4" => Ok(Compression::Lz4),
            None if text == "zstd" => Ok(Compression::default()),
            Some(("zstd", level)) => match level.parse() {
                Ok(level) if LEVELS.contains(&level) => Ok(Compression::Zstd(level)),
                _ => Err("the level of zstd is a number from 1 to 22"),
            },
            _ => Err("the compressions are none, lz4 and zstd:LEVEL"),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => f.write_str("none"),
            Compression::Lz4 => f.write_str("lz4"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// Encodes chunks, each with the same compression.
pub(crate) struct Encoder {
    compression: Compression,
    zstd: Option<Compressor<'static>>,
    frame: Vec<u8>,
}

impl Encoder {
    /// Creates an encoder for chunks of at most `most` bytes.
    pub(crate) fn new(compression: Compression, most: usize) -> std::io::Result<Self> {
        let zstd = match compression {
            Compression::Zstd(level) => Some(Compressor::new(level)?),
            _ => None,
        };
        let bound = lz4_flex::block::get_maximum_output_size(most);
        Ok(Encoder {
            compression,
            zstd,
            frame: vec![0; bound.max(zstd::zstd_safe::compress_bound(most))],
        })
    }

    /// Returns the stored bytes of a chunk of whole pages, or `None` if its content is all zeros.
    pub(crate) fn encode(&mut self, content: &[u8]) -> Option<(Coding, Vec<u8>)> {
        let hashes: Vec<u64> = content.chunks_exact(PAGE_LEN).map(page_hash).collect();
        if hashes.iter().all(|hash| *hash == 0) {
            return None;
        }
        let (coding, len) = match (self.compression, &mut self.zstd) {
            (Compression::Zstd(_), Some(zstd)) => {
                (Coding::Zstd, zstd.compress_to_buffer(content, &mut self.frame[..]).ok())
            }
            (Compression::Lz4, _) => {
                (Coding::Lz4, lz4_flex::block::compress_into(content, &mut self.frame).ok())
            }
            _ => (Coding::None, None),
        };
        let gained = len.filter(|len| *len <= content.len() / 20 * 19);
        let (coding, frame) = match gained {
            Some(len) => (coding, &self.frame[..len]),
            None => (Coding::None, content),
        };
        let mut stored = Vec::with_capacity(hashes.len() * HASH + frame.len());
        stored.extend(hashes.iter().flat_map(|hash| hash.to_le_bytes()));
        stored.extend(frame);
        Some((coding, stored))
    }
}

thread_local! {
    /// The zstd context of a thread, which takes longer to create than to use.
    static ZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes a chunk of `len` bytes from its stored bytes, whose digest the caller has checked, and
/// checks the hash of each page.
///
/// # Errors
///
/// [`LayoutError`]. Nothing is allocated but `len` bytes, whatever the frame claims.
pub fn decode_chunk(coding: Coding, stored: &[u8], len: usize) -> Result<Vec<u8>, LayoutError> {
    let (what, expected) = ("the content of a chunk", len as u64);
    if len == 0 || !len.is_multiple_of(PAGE_LEN) {
        return Err(LayoutError::Bounds { what: "the length of a chunk", value: expected });
    }
    let Some((hashes, frame)) = stored.split_at_checked(hash_bytes(len)) else {
        return Err(LayoutError::Length { what, len: stored.len() as u64, expected });
    };
    let content = match coding {
        Coding::None if frame.len() == len => frame.to_vec(),
        Coding::None => {
            return Err(LayoutError::Length { what, len: frame.len() as u64, expected });
        }
        Coding::Lz4 => decompress(len, |to| lz4_flex::block::decompress_into(frame, to).ok())?,
        Coding::Zstd => decompress(len, |to| {
            ZSTD.with_borrow_mut(|context| {
                if context.is_none() {
                    *context = Decompressor::new().ok();
                }
                context.as_mut()?.decompress_to_buffer(frame, to).ok()
            })
        })?,
    };
    for (page, (content, hash)) in
        (0..).zip(content.chunks_exact(PAGE_LEN).zip(hashes.chunks_exact(HASH)))
    {
        if page_hash(content).to_le_bytes() != hash {
            return Err(LayoutError::Page { page });
        }
    }
    Ok(content)
}

/// Decompresses to exactly `len` bytes.
fn decompress(
    len: usize,
    into: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> Result<Vec<u8>, LayoutError> {
    let mut content = vec![0; len];
    match into(&mut content) {
        Some(got) if got == len => Ok(content),
        _ => Err(LayoutError::Frame { expected: len as u64 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_are_read_back() {
        for it in [Compression::None, Compression::Lz4, Compression::Zstd(1), Compression::Zstd(22)]
        {
            assert_eq!(it.to_string().parse(), Ok(it));
        }
        for wrong in ["", "zstd:0", "zstd:23", "zstd:", "lz4:1", "gzip"] {
            assert!(wrong.parse::<Compression>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn incompressible_content_is_stored_raw() {
        let mut state = 1_u64;
        let random = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        };
        let content: Vec<u8> = (0..8192).map(random).collect();
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd(3)] {
            let mut encoder = Encoder::new(compression, 8192).unwrap();
            let (coding, stored) = encoder.encode(&content).unwrap();
            assert_eq!((coding, stored.len()), (Coding::None, 16 + 8192));
            assert_eq!(decode_chunk(coding, &stored, 8192), Ok(content.clone()));
            let (coding, stored) = encoder.encode(&[7; 8192]).unwrap();
            assert_eq!(coding == Coding::None, compression == Compression::None);
            assert_eq!(decode_chunk(coding, &stored, 8192), Ok(vec![7; 8192]));
            assert!(decode_chunk(coding, &stored, 12288).is_err());
            assert!(decode_chunk(coding, &stored, 4096).is_err());
            assert_eq!(encoder.encode(&[0; 8192]), None);
        }
    }

    #[test]
    fn pages_are_checked_after_decoding() {
        let content = [[7; PAGE_LEN], [0; PAGE_LEN], [9; PAGE_LEN]].concat();
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd(3)] {
            let mut encoder = Encoder::new(compression, content.len()).unwrap();
            let (coding, stored) = encoder.encode(&content).unwrap();
            for page in 0..3 {
                let mut stored = stored.clone();
                stored[page * HASH] ^= 1;
                let decoded = decode_chunk(coding, &stored, content.len());
                assert_eq!(decoded, Err(LayoutError::Page { page: page as u64 }));
            }
        }
    }
}
