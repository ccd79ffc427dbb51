// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages between a VMM and a pager, as `docs/pager-protocol.md` describes them.
//!
//! A pager reads [`Call`]s and writes [`Reply`]s.

use std::io::{self, Read};

use demand_source::{Priority, Retry, to_usize};

/// The version of the protocol.
pub const VERSION: u16 = 1;
/// Most bytes of a fault.
pub const MOST: usize = 128 << 10;
/// Most faults that wait for an answer at a time.
pub const MOST_OPEN: usize = 1024;
/// Most bytes of an image's name.
pub const LONGEST_NAME: usize = 4096;
/// Most bytes of an error's text.
pub const LONGEST_TEXT: usize = 1024;
/// The tag of an error that refuses a handshake. No fault has it.
pub const NO_TAG: u64 = 0;

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;
/// Bytes of a pager's greeting.
pub(crate) const GREETING: usize = 40;
/// Bytes of an error before its text.
const FAILURE: usize = 16;
/// Bytes of a fault.
const FAULT: usize = 24;

const HANDSHAKE: u16 = 0x20;
const FAULT_CALL: u16 = 0x21;
const RAISE: u16 = 0x22;
const RELEASE: u16 = 0x23;
const MISSING: u16 = 0x24;
const DATA: u16 = 0x28;
const STAGED: u16 = 0x29;
const ZERO: u16 = 0x2a;
const ERROR: u16 = 0x2b;

/// The flag of a greeting that passes a staging area.
const STAGING: u16 = 1;
/// The flag of a greeting of a pager that takes [`Call::Missing`].
const WATCHES: u16 = 2;
/// The flag of an error that may pass.
const LATER: u32 = 1;

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    number.copy_from_slice(&bytes[at..at + N]);
    number
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(number(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

/// Appends a header for `len` bytes that follow.
fn header(bytes: &mut Vec<u8>, command: u16, len: usize) {
    bytes.extend(command.to_le_bytes());
    bytes.extend([0; 6]);
    bytes.extend((len as u64).to_le_bytes());
}

/// A fault: a range of the image that the VMM needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Names the fault in its answer.
    pub tag: u64,
    /// Offset in the image, in bytes.
    pub offset: u64,
    /// Number of bytes, 1 to [`MOST`].
    pub len: u32,
    /// The urgency.
    pub priority: Priority,
}

/// A message to a pager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// The first message of a connection. The pager answers with [`Reply::Handshake`], or refuses
    /// with [`Reply::Error`] and the tag [`NO_TAG`].
    Handshake {
        /// The version that the VMM speaks.
        version: u16,
        /// The image's name. It may be empty.
        name: String,
    },
    /// Asks for bytes.
    Fault(Fault),
    /// A thread waits for the bytes of a fault that was sent as fill.
    Raise(u64),
    /// The bytes of a fault have been copied out of the staging area.
    Release(u64),
    /// Passes the bitmap of a region's missing pages, to a pager that [asks](Greeting::watches) for
    /// it. The message is sent by `sendmsg`, with a memfd as its only file descriptor
    /// (`SCM_RIGHTS`), which can only be read: a little-endian word of 64 bits for each 64 pages of
    /// 4096 bytes. A bit is set while its page is missing.
    Missing {
        /// Offset in the image of the region's first page, in bytes.
        offset: u64,
        /// Number of the region's pages.
        pages: u64,
    },
}

impl Call {
    /// Appends the message to `bytes`.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        match self {
            Call::Handshake { version, name } => {
                header(bytes, HANDSHAKE, 8 + name.len());
                bytes.extend(version.to_le_bytes());
                bytes.extend([0; 6]);
                bytes.extend(name.as_bytes());
            }
            Call::Fault(fault) => {
                header(bytes, FAULT_CALL, FAULT);
                bytes.extend(fault.tag.to_le_bytes());
                bytes.extend(fault.offset.to_le_bytes());
                bytes.extend(fault.len.to_le_bytes());
                // The path is unknown, and the rest is reserved.
                bytes.extend([u8::from(fault.priority == Priority::Demand), 0, 0, 0]);
            }
            Call::Raise(tag) => {
                header(bytes, RAISE, 8);
                bytes.extend(tag.to_le_bytes());
            }
            Call::Release(tag) => {
                header(bytes, RELEASE, 8);
                bytes.extend(tag.to_le_bytes());
            }
            Call::Missing { offset, pages } => {
                header(bytes, MISSING, 16);
                bytes.extend(offset.to_le_bytes());
                bytes.extend(pages.to_le_bytes());
            }
        }
    }

    /// Reads the next message. Returns `None` if the VMM has closed the connection.
    ///
    /// # Errors
    ///
    /// The stream's errors; [`InvalidData`](io::ErrorKind::InvalidData) for anything that no VMM of
    /// this version sends.
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Call>> {
        let mut head = [0; HEADER];
        match stream.read(&mut head)? {
            0 => return Ok(None),
            read => stream.read_exact(&mut head[read..])?,
        }
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let (command, len) = (u16_at(&head, 0), u64_at(&head, 8));
        if len > (8 + LONGEST_NAME) as u64 {
            return invalid("a message of the VMM is too long");
        }
        let mut body = vec![0; to_usize(len)];
        stream.read_exact(&mut body)?;
        let call = match (command, body.len()) {
            (HANDSHAKE, 8..) => {
                let Ok(name) = String::from_utf8(body[8..].to_vec()) else {
                    return invalid("the image's name is not UTF-8");
                };
                Call::Handshake { version: u16_at(&body, 0), name }
            }
            (FAULT_CALL, FAULT) => {
                let demand = body[20] != 0;
                let priority = if demand { Priority::Demand } else { Priority::Fill };
                let (tag, offset) = (u64_at(&body, 0), u64_at(&body, 8));
                Call::Fault(Fault { tag, offset, len: u32_at(&body, 16), priority })
            }
            (RAISE, 8) => Call::Raise(u64_at(&body, 0)),
            (RELEASE, 8) => Call::Release(u64_at(&body, 0)),
            (MISSING, 16) => Call::Missing { offset: u64_at(&body, 0), pages: u64_at(&body, 8) },
            _ => return invalid("a message of the VMM is unknown, or has another length"),
        };
        Ok(Some(call))
    }
}

/// A pager's answer to the handshake: the image that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The version that the pager speaks.
    pub version: u16,
    /// Size of the image, in bytes.
    pub size: u64,
    /// Size of the staging area in bytes, whose memfd is passed with the message; `None` if there is
    /// none.
    pub staging: Option<u64>,
    /// Whether the pager takes [`Call::Missing`].
    pub watches: bool,
    /// Names the image's content. A pager that is started again with the same content has the same.
    pub generation: [u8; 16],
}

impl Greeting {
    /// Reads the part of the message behind its header. Returns `None` if a flag is unknown.
    pub(crate) fn decode(body: &[u8; GREETING]) -> Option<Greeting> {
        let flags = u16_at(body, 2);
        let staging = (flags & STAGING != 0).then(|| u64_at(body, 16));
        let greeting = Greeting {
            version: u16_at(body, 0),
            size: u64_at(body, 8),
            staging,
            watches: flags & WATCHES != 0,
            generation: number(body, 24),
        };
        (flags & !(STAGING | WATCHES) == 0).then_some(greeting)
    }
}

/// A message of a pager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The answer to the handshake. With a staging area, the message is sent by `sendmsg`, with the
    /// memfd as its only file descriptor (`SCM_RIGHTS`).
    Handshake(Greeting),
    /// The bytes of a fault, all of them.
    Data {
        /// The fault's tag.
        tag: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The bytes of a fault are in the staging area. The pager changes them only after
    /// [`Call::Release`].
    Staged {
        /// The fault's tag.
        tag: u64,
        /// Offset in the staging area, in bytes.
        offset: u64,
    },
    /// All bytes of a fault are zero.
    Zero {
        /// The fault's tag.
        tag: u64,
    },
    /// The fault, or the handshake, failed.
    Error {
        /// The fault's tag, or [`NO_TAG`].
        tag: u64,
        /// Whether another attempt may succeed.
        retry: Retry,
        /// One line, `CAUSE; HINT`, which the user sees; at most [`LONGEST_TEXT`] bytes.
        text: String,
    },
}

impl Reply {
    /// Returns the message.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Reply::Handshake(greeting) => {
                header(&mut bytes, HANDSHAKE, GREETING);
                let staging = if greeting.staging.is_some() { STAGING } else { 0 };
                let flags = staging | if greeting.watches { WATCHES } else { 0 };
                bytes.extend(greeting.version.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes.extend([0; 4]);
                bytes.extend(greeting.size.to_le_bytes());
                bytes.extend(greeting.staging.unwrap_or(0).to_le_bytes());
                bytes.extend(greeting.generation);
            }
            Reply::Data { tag, bytes: content } => {
                header(&mut bytes, DATA, 8 + content.len());
                bytes.extend(tag.to_le_bytes());
                bytes.extend(content);
            }
            Reply::Staged { tag, offset } => {
                header(&mut bytes, STAGED, 16);
                bytes.extend(tag.to_le_bytes());
                bytes.extend(offset.to_le_bytes());
            }
            Reply::Zero { tag } => {
                header(&mut bytes, ZERO, 8);
                bytes.extend(tag.to_le_bytes());
            }
            Reply::Error { tag, retry, text } => {
                let text = &text.as_bytes()[..text.len().min(LONGEST_TEXT)];
                header(&mut bytes, ERROR, FAILURE + text.len());
                bytes.extend(tag.to_le_bytes());
                let flags = if *retry == Retry::Later { LATER } else { 0 };
                bytes.extend(flags.to_le_bytes());
                bytes.extend([0; 4]);
                bytes.extend(text);
            }
        }
        bytes
    }
}

/// The first part of a pager's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// A greeting follows.
    Handshake,
    /// `len` bytes follow.
    Data {
        tag: u64,
        len: u64,
    },
    Staged {
        tag: u64,
        offset: u64,
    },
    Zero {
        tag: u64,
    },
    /// A text of `len` bytes follows.
    Error {
        tag: u64,
        retry: Retry,
        len: usize,
    },
}

/// The reason for which a message cannot be read.
#[derive(Debug)]
pub(crate) enum Unread {
    Stream(io::Error),
    /// The pager does not keep to the protocol.
    Nonsense(&'static str),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        Unread::Stream(error)
    }
}

impl Head {
    /// Reads what follows the 16 bytes of a message's header, up to its content.
    pub(crate) fn read(head: &[u8; HEADER], stream: &mut impl Read) -> Result<Head, Unread> {
        let (command, len) = (u16_at(head, 0), u64_at(head, 8));
        if len > (8 + MOST) as u64 {
            return Err(Unread::Nonsense("it sends a message that is too long"));
        }
        let len = to_usize(len);
        let mut fixed = [0; 16];
        // As much as the messages of this kind have before their content.
        let fixed = match command {
            HANDSHAKE => &mut fixed[..0],
            DATA | ZERO => &mut fixed[..8],
            STAGED | ERROR => &mut fixed[..16],
            _ => return Err(Unread::Nonsense("it sends a message of an unknown kind")),
        };
        let Some(rest) = len.checked_sub(fixed.len()) else {
            return Err(Unread::Nonsense("it sends a message that is too short"));
        };
        stream.read_exact(fixed)?;
        let tag = || u64_at(fixed, 0);
        match (command, rest) {
            (HANDSHAKE, GREETING) => Ok(Head::Handshake),
            (DATA, rest) => Ok(Head::Data { tag: tag(), len: rest as u64 }),
            (STAGED, 0) => Ok(Head::Staged { tag: tag(), offset: u64_at(fixed, 8) }),
            (ZERO, 0) => Ok(Head::Zero { tag: tag() }),
            (ERROR, ..=LONGEST_TEXT) => {
                let later = u32_at(fixed, 8) & LATER != 0;
                let retry = if later { Retry::Later } else { Retry::Never };
                Ok(Head::Error { tag: tag(), retry, len: rest })
            }
            _ => Err(Unread::Nonsense("it sends a message of a wrong length")),
        }
    }
}

/// Reads the text of an error, as one line whatever the pager sends.
pub(crate) fn read_text(stream: &mut impl Read, len: usize) -> io::Result<String> {
    let mut text = vec![0; len];
    stream.read_exact(&mut text)?;
    let line = String::from_utf8_lossy(&text);
    Ok(line.trim().replace(char::is_control, "\u{fffd}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_survive_a_round_trip() {
        let fault = Fault { tag: 7, offset: 1 << 40, len: 4096, priority: Priority::Demand };
        let calls = [
            Call::Handshake { version: 1, name: "vm7/memory".into() },
            Call::Fault(fault),
            Call::Fault(Fault { priority: Priority::Fill, ..fault }),
            Call::Raise(8),
            Call::Release(u64::MAX),
            Call::Missing { offset: 1 << 32, pages: 512 },
        ];
        let mut bytes = Vec::new();
        calls.iter().for_each(|call| call.encode(&mut bytes));
        let mut stream = &bytes[..];
        for call in calls {
            assert_eq!(Call::read(&mut stream).unwrap(), Some(call));
        }
        assert_eq!(Call::read(&mut stream).unwrap(), None);
    }

    #[test]
    fn foreign_calls_are_refused() {
        for (command, len) in [(9, 16), (HANDSHAKE, 7), (FAULT_CALL, 25), (RAISE, 1 << 40)] {
            let mut bytes = Vec::new();
            header(&mut bytes, command, len);
            bytes.resize(64, 0);
            let error = Call::read(&mut &bytes[..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{command}, {len}");
        }
    }

    /// The bytes of the document, of which other programs make theirs.
    #[test]
    fn messages_have_the_documented_bytes() {
        let mut bytes = Vec::new();
        let fault = Fault { tag: 2, offset: 0x3000, len: 4096, priority: Priority::Demand };
        Call::Fault(fault).encode(&mut bytes);
        let expected = "2100000000000000180000000000000002000000000000000030000000000000\
                        0010000001000000";
        assert_eq!(hex(&bytes), expected);
        let greeting = Greeting {
            version: 1,
            size: 0x10000,
            staging: Some(0x2000),
            watches: false,
            generation: [0xab; 16],
        };
        let expected = "2000000000000000280000000000000001000100000000000000010000000000\
                        0020000000000000abababababababababababababababab";
        assert_eq!(hex(&Reply::Handshake(greeting).encode()), expected);
        let greeting = Greeting { staging: None, watches: true, ..greeting };
        let expected = "2000000000000000280000000000000001000200000000000000010000000000\
                        0000000000000000abababababababababababababababab";
        assert_eq!(hex(&Reply::Handshake(greeting).encode()), expected);
        let mut bytes = Vec::new();
        Call::Missing { offset: 0x1_0000, pages: 16 }.encode(&mut bytes);
        let expected = "2400000000000000100000000000000000000100000000001000000000000000";
        assert_eq!(hex(&bytes), expected);
        let error = Reply::Error { tag: 2, retry: Retry::Later, text: "no".into() };
        let expected = "2b000000000000001200000000000000020000000000000001000000000000006e6f";
        assert_eq!(hex(&error.encode()), expected);
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
