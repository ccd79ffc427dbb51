// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The answers of a pager.

use std::io::Read;
use std::os::unix::net::UnixStream;

use demand_source::Retry;

use crate::connection::Staging;
use crate::error::{PagerError, PagerErrorKind, lost, violation};
use crate::protocol::{Call, HEADER, Head, read_text};
use crate::queue::{Open, Queue};

/// The receiving end of a connection.
pub(crate) struct Receiver<'a> {
    pub(crate) queue: &'a Queue,
    /// The pager, as errors call it.
    pub(crate) pager: &'a str,
    pub(crate) staging: Option<Staging>,
    /// Number of answers so far.
    pub(crate) answers: u64,
}

impl Receiver<'_> {
    /// Receives answers until the connection breaks.
    pub(crate) fn run(&mut self, stream: UnixStream) -> PagerErrorKind {
        let mut stream = std::io::BufReader::with_capacity(64 << 10, stream);
        loop {
            if let Err(kind) = self.answer(&mut stream) {
                return kind;
            }
        }
    }

    /// Receives one answer.
    pub(crate) fn answer(&mut self, stream: &mut impl Read) -> Result<(), PagerErrorKind> {
        let mut head = [0; HEADER];
        stream.read_exact(&mut head).map_err(lost)?;
        let head = Head::read(&head, stream)?;
        let tag = match head {
            Head::Handshake => return violation("it sends a second handshake"),
            Head::Data { tag, .. }
            | Head::Staged { tag, .. }
            | Head::Zero { tag }
            | Head::Error { tag, .. } => tag,
        };
        let Some(mut open) = self.queue.take(tag) else {
            return violation("it answers a fault that has no such tag, or was answered before");
        };
        match self.deliver(head, &mut open, stream) {
            Ok(None) => open.part.succeed(),
            Ok(Some((retry, text))) => {
                let (offset, len) = (open.part.offset(), open.part.len() as u64);
                let kind = PagerErrorKind::Failed { offset, len, retry, text };
                open.part.fail(PagerError::new(self.pager, kind).into());
            }
            Err(kind) => {
                // It is answered after the next connection, or fails with all others.
                self.queue.give_back(open);
                return Err(kind);
            }
        }
        self.answers += 1;
        Ok(())
    }

    /// Writes an answer to its destination. Returns the pager's error, if it is one.
    fn deliver(
        &self,
        head: Head,
        open: &mut Open,
        stream: &mut impl Read,
    ) -> Result<Option<(Retry, String)>, PagerErrorKind> {
        let len = open.part.len();
        let destination = open.part.destination();
        match head {
            Head::Handshake => violation("it sends a second handshake"),
            Head::Data { len: sent, .. } if sent != len as u64 => {
                violation("it sends another number of bytes than a fault asked for")
            }
            Head::Data { .. } => {
                destination.read_exact_from(0, len, stream).map_err(lost)?;
                Ok(None)
            }
            Head::Staged { tag, offset } => {
                let Some(staging) = &self.staging else {
                    return violation("it refers to a staging area, and has none");
                };
                let end = offset.checked_add(len as u64);
                if end.is_none_or(|end| end > staging.size) {
                    return violation("it refers to bytes outside its staging area");
                }
                let mut done = 0;
                while done < len {
                    let at = offset + done as u64;
                    match destination.read_from(done, &staging.memory, at) {
                        Ok(0) => return violation("its staging area has shrunk"),
                        Ok(read) => done += read,
                        Err(_) => return violation("its staging area cannot be read"),
                    }
                }
                self.queue.note(Call::Release(tag), None);
                Ok(None)
            }
            Head::Zero { .. } => {
                destination.fill_zeros();
                Ok(None)
            }
            Head::Error { retry, len, .. } => {
                Ok(Some((retry, read_text(stream, len).map_err(lost)?)))
            }
        }
    }
}
