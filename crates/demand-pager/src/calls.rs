// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pager's end of a connection: messages, and the files that are passed with them.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::net::UnixStream;

use crate::connection::receive;
use crate::protocol::Call;

/// Reads the messages of a VMM, for a pager written in Rust.
///
/// # Examples
///
/// ```
/// use demand_pager::Calls;
/// use demand_pager::protocol::{Call, VERSION};
/// use std::io::Write;
/// use std::os::unix::net::UnixStream;
///
/// let (mut vmm, pager) = UnixStream::pair().unwrap();
/// let (hello, mut bytes) = (Call::Handshake { version: VERSION, name: "vm7".into() }, Vec::new());
/// hello.encode(&mut bytes);
/// vmm.write_all(&bytes).unwrap();
/// drop(vmm);
///
/// let mut calls = Calls::new(&pager);
/// assert_eq!(calls.receive().unwrap().unwrap().0, hello);
/// assert!(calls.receive().unwrap().is_none(), "the VMM has closed the connection");
/// ```
pub struct Calls<'a>(BufReader<Passing<'a>>);

/// A stream, and the files that have come with the bytes that were read.
struct Passing<'a> {
    stream: &'a UnixStream,
    files: VecDeque<File>,
}

impl<'a> Calls<'a> {
    /// Reads from a connection that was accepted.
    pub fn new(stream: &'a UnixStream) -> Self {
        Calls(BufReader::new(Passing { stream, files: VecDeque::new() }))
    }

    /// Reads the next message, and the bitmap that [`Call::Missing`] passes. Returns `None` if the
    /// VMM has closed the connection.
    ///
    /// # Errors
    ///
    /// Those of [`Call::read`]; [`InvalidData`](ErrorKind::InvalidData) if no file was passed.
    pub fn receive(&mut self) -> io::Result<Option<(Call, Option<File>)>> {
        let Some(call) = Call::read(&mut self.0)? else { return Ok(None) };
        let Call::Missing { .. } = call else { return Ok(Some((call, None))) };
        let file = self.0.get_mut().files.pop_front().ok_or_else(|| {
            io::Error::new(ErrorKind::InvalidData, "a message of the VMM passes no bitmap")
        })?;
        Ok(Some((call, Some(file))))
    }
}

impl Read for Passing<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (read, passed) = receive(self.stream, bytes)?;
        self.files.extend(passed.into_iter().map(File::from));
        Ok(read)
    }
}

impl fmt::Debug for Calls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("stream", self.0.get_ref().stream).finish_non_exhaustive()
    }
}
