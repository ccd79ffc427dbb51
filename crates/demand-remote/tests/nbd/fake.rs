// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server that greets properly, and then does as a test wants.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tempfile::TempDir;

/// Size of the export, in bytes.
pub(crate) const SIZE: u64 = 1 << 20;

/// Answers a request for bytes from an offset on: cookie, offset, length.
type Answer = fn(&mut UnixStream, u64, u64, u32) -> io::Result<()>;

/// A server in this process. Its threads end with their connections.
pub(crate) struct Fake {
    folder: TempDir,
    greeted: Arc<AtomicUsize>,
}

impl Fake {
    pub(crate) fn start(answer: Answer) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let fake = Fake { greeted: Arc::default(), folder };
        let (listener, greeted) =
            (UnixListener::bind(fake.socket()).unwrap(), fake.greeted.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, greeted) = (stream.unwrap(), greeted.clone());
                thread::spawn(move || serve(&mut stream, &greeted, answer));
            }
        });
        fake
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn url(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Returns the number of connections that were made.
    pub(crate) fn connections(&self) -> usize {
        self.greeted.load(Ordering::SeqCst)
    }
}

fn number<const N: usize>(stream: &mut UnixStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes[8 - N..])?;
    Ok(u64::from_be_bytes(bytes))
}

fn serve(stream: &mut UnixStream, greeted: &AtomicUsize, answer: Answer) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    number::<4>(stream)?;
    greeted.fetch_add(1, Ordering::SeqCst);
    loop {
        number::<8>(stream)?;
        let (option, len) = (number::<4>(stream)?, number::<4>(stream)?);
        io::copy(&mut Read::take(&mut *stream, len), &mut io::sink())?;
        let mut reply = |kind: u32, data: &[u8]| {
            let parts = [
                &0x0003_e889_0455_65a9u64.to_be_bytes()[..],
                &(option as u32).to_be_bytes(),
                &kind.to_be_bytes(),
                &(data.len() as u32).to_be_bytes(),
                data,
            ];
            stream.write_all(&parts.concat())
        };
        // GO, with an export that may have several connections; nothing else is known.
        if option == 7 {
            reply(3, &[&[0, 0][..], &SIZE.to_be_bytes(), &[1, 3]].concat())?;
            reply(1, &[])?;
            break;
        }
        reply(1 << 31 | 1, &[])?;
    }
    loop {
        number::<8>(stream)?;
        let (cookie, offset) = (number::<8>(stream)?, number::<8>(stream)?);
        let len = number::<4>(stream)?;
        answer(stream, cookie, offset, len as u32)?;
    }
}

/// Sends a simple reply with bytes that are all 7.
pub(crate) fn sevens(stream: &mut UnixStream, cookie: u64, len: u32) -> io::Result<()> {
    let mut reply = 0x6744_6698_0000_0000u64.to_be_bytes().to_vec();
    reply.extend(cookie.to_be_bytes());
    reply.extend(vec![7; len as usize]);
    stream.write_all(&reply)
}
