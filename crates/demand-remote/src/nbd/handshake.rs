// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Negotiation: the part of a connection before its first request.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::{NbdErrorKind, Refusal, lost, violation};
use super::option::{Info, Reply, receive, send, string};
use super::protocol::{
    ALLOCATION, CAN_MULTI_CONN, FIXED_NEWSTYLE, GREETING, INFO_BLOCK_SIZE, NO_ZEROES,
    OPT_EXPORT_NAME, OPT_GO, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPTION,
    REP_INFO, REP_META_CONTEXT,
};

/// Most replies to one option.
const MOST_REPLIES: usize = 100;
/// Block sizes of a server that does not say them: what the protocol advises clients to assume.
const DEFAULT_BLOCKS: Blocks = Blocks { least: 512, most: 32 << 20 };

/// The limits of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Requests begin and end at multiples of it (bytes), a power of two.
    pub(crate) least: u32,
    /// Most bytes of a read.
    pub(crate) most: u32,
}

/// An export, as a server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    /// Size, in bytes.
    pub(crate) size: u64,
    pub(crate) blocks: Blocks,
    /// Whether several connections may be made.
    pub(crate) several: bool,
}

/// The parts of the protocol that a connection uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Whether reads have structured replies.
    pub(crate) structured: bool,
    /// The server's number for the metadata context that tells zeros from data.
    pub(crate) allocation: Option<u32>,
}

/// Exchanges greetings. Returns whether zeros follow the answer to an export's name.
pub(crate) async fn greet<S>(stream: &mut S) -> Result<bool, NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if stream.read_u64().await.map_err(lost)? != GREETING {
        return violation("it does not greet as an NBD server does");
    }
    if stream.read_u64().await.map_err(lost)? != OPTION {
        return violation("it speaks only the old style of negotiation");
    }
    let flags = stream.read_u16().await.map_err(lost)?;
    if flags & FIXED_NEWSTYLE == 0 {
        return violation("it does not speak the fixed new style of negotiation");
    }
    let answer = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    stream.write_all(&answer.to_be_bytes()).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    Ok(flags & NO_ZEROES == 0)
}

/// Asks the server to speak TLS from here on.
pub(crate) async fn start_tls<S>(stream: &mut S) -> Result<(), NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send(stream, OPT_STARTTLS, &[]).await?;
    match receive(stream, OPT_STARTTLS).await? {
        Reply::Ack => Ok(()),
        Reply::Refused { refusal: Refusal::Unsupported | Refusal::Policy, .. } => {
            Err(NbdErrorKind::NoTls)
        }
        Reply::Refused { refusal, message } => Err(NbdErrorKind::Refused { refusal, message }),
        Reply::Other { .. } => violation("it answers STARTTLS with something else"),
    }
}

/// Agrees on an export and the parts of the protocol to use, and ends the negotiation.
pub(crate) async fn agree<S>(
    stream: &mut S,
    name: &str,
    zeros: bool,
) -> Result<(Export, Mode), NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send(stream, OPT_STRUCTURED_REPLY, &[]).await?;
    let structured = match receive(stream, OPT_STRUCTURED_REPLY).await? {
        Reply::Ack => true,
        Reply::Refused { refusal: refusal @ Refusal::TlsRequired, message } => {
            return Err(NbdErrorKind::Refused { refusal, message });
        }
        Reply::Refused { .. } => false,
        Reply::Other { .. } => return violation("it answers STRUCTURED_REPLY with something else"),
    };
    let allocation = if structured { set_context(stream, name).await? } else { None };
    let mode = Mode { structured, allocation };
    let export = match go(stream, name).await? {
        Some(export) => export,
        None => by_name(stream, name, zeros).await?,
    };
    if i64::try_from(export.size).is_err() {
        return violation("its export is larger than any file can be");
    }
    Ok((export, mode))
}

/// Asks for the metadata context. Returns its number, or `None` if the server has none.
async fn set_context<S>(stream: &mut S, name: &str) -> Result<Option<u32>, NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut data = string(name.as_bytes());
    data.extend(1u32.to_be_bytes());
    data.extend(string(ALLOCATION));
    send(stream, OPT_SET_META_CONTEXT, &data).await?;
    let mut context = None;
    for _ in 0..MOST_REPLIES {
        match receive(stream, OPT_SET_META_CONTEXT).await? {
            Reply::Ack => return Ok(context),
            Reply::Refused { .. } => return Ok(None),
            Reply::Other { kind: REP_META_CONTEXT, data } => match data.split_first_chunk() {
                Some((id, name)) if name == ALLOCATION => context = Some(u32::from_be_bytes(*id)),
                Some(_) => {}
                None => return violation("its metadata context has no number"),
            },
            Reply::Other { .. } => {
                return violation("it answers SET_META_CONTEXT with something else");
            }
        }
    }
    violation("it does not end its list of metadata contexts")
}

/// Chooses the export. Returns `None` if the server is too old for this option.
async fn go<S>(stream: &mut S, name: &str) -> Result<Option<Export>, NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut data = string(name.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    send(stream, OPT_GO, &data).await?;
    let (mut found, mut blocks) = (None, DEFAULT_BLOCKS);
    for _ in 0..MOST_REPLIES {
        match receive(stream, OPT_GO).await? {
            Reply::Ack => {
                let Some((size, several)) = found else {
                    return violation("it accepts the export without its size");
                };
                return Ok(Some(Export { size, blocks, several }));
            }
            Reply::Refused { refusal: Refusal::Unsupported, .. } => return Ok(None),
            Reply::Refused { refusal, message } => {
                return Err(NbdErrorKind::Refused { refusal, message });
            }
            Reply::Other { kind: REP_INFO, data } => match Info::parse(&data)? {
                Info::Export { size, several } => found = Some((size, several)),
                Info::Blocks(said) => blocks = said,
                Info::Other => {}
            },
            Reply::Other { .. } => return violation("it answers GO with something else"),
        }
    }
    violation("it does not end its description of the export")
}

/// Chooses the export as servers before `GO` want it.
async fn by_name<S>(stream: &mut S, name: &str, zeros: bool) -> Result<Export, NbdErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send(stream, OPT_EXPORT_NAME, name.as_bytes()).await?;
    let size = match stream.read_u64().await {
        // It has no other answer.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let refusal = Refusal::UnknownExport;
            return Err(NbdErrorKind::Refused { refusal, message: String::new() });
        }
        size => size.map_err(lost)?,
    };
    let flags = stream.read_u16().await.map_err(lost)?;
    if zeros {
        stream.read_exact(&mut [0; 124]).await.map_err(lost)?;
    }
    Ok(Export { size, blocks: DEFAULT_BLOCKS, several: flags & CAN_MULTI_CONN != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::protocol::{INFO_EXPORT, OPTION_REPLY, REP_ACK, REP_ERROR};
    use crate::runtime;
    use tokio::io::join;

    fn reply_of(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(string(data));
        bytes
    }

    fn export_of(size: u64, flags: u16) -> Vec<u8> {
        [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    fn blocks_of(least: u32, most: u32) -> Vec<u8> {
        let kind = INFO_BLOCK_SIZE.to_be_bytes();
        let sizes = [least, 4096, most].map(u32::to_be_bytes).concat();
        [&kind[..], &sizes].concat()
    }

    fn context_of(id: u32, name: &[u8]) -> Vec<u8> {
        [&id.to_be_bytes()[..], name].concat()
    }

    fn agree_on(replies: &[Vec<u8>]) -> Result<(Export, Mode), NbdErrorKind> {
        let replies = replies.concat();
        let mut stream = join(&replies[..], tokio::io::sink());
        runtime::wait(agree(&mut stream, "vm7", true))
    }

    fn ack(option: u32) -> Vec<u8> {
        reply_of(option, REP_ACK, &[])
    }

    fn error(option: u32, error: u32) -> Vec<u8> {
        reply_of(option, REP_ERROR | error, b"no\x07")
    }

    #[test]
    fn greetings_of_other_servers_are_refused() {
        let greeting =
            |magic: &[u8; 8], flags: u16| [b"NBDMAGIC", magic, &flags.to_be_bytes()[..]].concat();
        for (bytes, expected) in [
            (greeting(b"IHAVEOPT", 3), Ok(false)),
            (greeting(b"IHAVEOPT", 1), Ok(true)),
            (greeting(b"IHAVEOPT", 2), Err("fixed new style")),
            (greeting(b"\0\0\x42\x02\x81\x86\x12\x53", 1), Err("old style")),
            (b"SSH-2.0-OpenSSH".to_vec(), Err("greet")),
            (b"NBD".to_vec(), Err("connection broke")),
        ] {
            let mut stream = join(&bytes[..], tokio::io::sink());
            match (runtime::wait(greet(&mut stream)), expected) {
                (Ok(zeros), Ok(expected)) => assert_eq!(zeros, expected),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{error}");
                }
                (greeted, expected) => panic!("{greeted:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn export_is_agreed_on() {
        let agreed = agree_on(&[
            ack(OPT_STRUCTURED_REPLY),
            reply_of(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context_of(1, b"other:context")),
            reply_of(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context_of(9, ALLOCATION)),
            ack(OPT_SET_META_CONTEXT),
            reply_of(OPT_GO, REP_INFO, &[0, 1, b'x']),
            reply_of(OPT_GO, REP_INFO, &export_of(1 << 40, 1 | CAN_MULTI_CONN)),
            reply_of(OPT_GO, REP_INFO, &blocks_of(4096, 1 << 20)),
            ack(OPT_GO),
        ]);
        let (export, mode) = agreed.unwrap();
        let blocks = Blocks { least: 4096, most: 1 << 20 };
        assert_eq!(export, Export { size: 1 << 40, blocks, several: true });
        assert_eq!(mode, Mode { structured: true, allocation: Some(9) });
    }

    #[test]
    fn old_servers_are_served() {
        let by_name = [&1000u64.to_be_bytes()[..], &[0, 1], &[0; 124]].concat();
        let (export, mode) =
            agree_on(&[error(OPT_STRUCTURED_REPLY, 1), error(OPT_GO, 1), by_name]).unwrap();
        assert_eq!(export, Export { size: 1000, blocks: DEFAULT_BLOCKS, several: false });
        assert_eq!(mode, Mode::default());
        let (_, mode) = agree_on(&[
            ack(OPT_STRUCTURED_REPLY),
            error(OPT_SET_META_CONTEXT, 1),
            reply_of(OPT_GO, REP_INFO, &export_of(1 << 40, 1)),
            ack(OPT_GO),
        ])
        .unwrap();
        assert_eq!(mode, Mode { structured: true, allocation: None });
        let refused = agree_on(&[error(OPT_STRUCTURED_REPLY, 1), error(OPT_GO, 1)]);
        let unknown =
            NbdErrorKind::Refused { refusal: Refusal::UnknownExport, message: String::new() };
        assert_eq!(refused.unwrap_err().to_string(), unknown.to_string());
    }

    #[test]
    fn bad_negotiation_is_an_error() {
        let plain = || vec![error(OPT_STRUCTURED_REPLY, 1)];
        let go = |data: &[u8]| vec![plain().concat(), reply_of(OPT_GO, REP_INFO, data)];
        let long = [
            &OPTION_REPLY.to_be_bytes()[..],
            &OPT_STRUCTURED_REPLY.to_be_bytes(),
            &REP_ACK.to_be_bytes(),
            &u32::MAX.to_be_bytes(),
        ];
        for (part, replies) in [
            ("requires TLS", vec![error(OPT_STRUCTURED_REPLY, 5)]),
            ("says: no\\u{7}", vec![plain().concat(), error(OPT_GO, 2)]),
            ("no such export", vec![plain().concat(), error(OPT_GO, 6)]),
            ("shutting down", vec![plain().concat(), error(OPT_GO, 7)]),
            ("error 0x63", vec![plain().concat(), error(OPT_GO, 99)]),
            ("another option", vec![ack(OPT_GO)]),
            ("too long", vec![long.concat()]),
            ("has data", vec![reply_of(OPT_STRUCTURED_REPLY, REP_ACK, &[1])]),
            ("something else", vec![reply_of(OPT_STRUCTURED_REPLY, REP_INFO, &[])]),
            ("without its size", vec![plain().concat(), ack(OPT_GO)]),
            ("no type", go(&[0])),
            ("wrong length", go(&export_of(1, 1)[..11])),
            ("wrong length", go(&blocks_of(1, 1 << 20)[..13])),
            ("impossible", go(&blocks_of(0, 1 << 20))),
            ("impossible", go(&blocks_of(3, 1 << 20))),
            ("impossible", go(&blocks_of(1 << 17, 1 << 20))),
            ("impossible", go(&blocks_of(1 << 16, 1 << 16))),
            ("impossible", go(&blocks_of(1, 0))),
            (
                "does not end",
                vec![plain().concat(), reply_of(OPT_GO, REP_INFO, &[0, 9]).repeat(101)],
            ),
            ("connection broke", plain()),
            ("larger than any file", vec![go(&export_of(u64::MAX, 1)).concat(), ack(OPT_GO)]),
        ] {
            let error = agree_on(&replies).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
