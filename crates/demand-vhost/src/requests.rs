// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end channel: serves requests from the back-end to the front-end, over a second
//! connection.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use vhost::vhost_user::{
    Error as ProtocolError, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler,
};

/// The handler of the only supported request, "configuration changed".
struct Changed<F>(F);

impl<F: Fn() + Send + Sync> VhostUserFrontendReqHandler for Changed<F> {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        (self.0)();
        Ok(0)
    }
}

/// Our end of the back-end channel. Requests are served until it is dropped.
pub(crate) struct Requests(UnixStream);

impl Requests {
    /// Starts the serving thread. Also returns the descriptor to send to the back-end.
    pub(crate) fn serve(changed: impl Fn() + Send + Sync + 'static) -> io::Result<(Self, OwnedFd)> {
        let handler = FrontendReqHandler::new(Arc::new(Changed(changed)));
        let mut handler = handler.map_err(io::Error::other)?;
        // Replies to requests that ask for one.
        handler.set_reply_ack_flag(true);
        let [ours, theirs] = [handler.as_raw_fd(), handler.get_tx_raw_fd()].map(|fd| {
            // SAFETY: the handler owns both descriptors and keeps them open during this call.
            unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
        });
        let (ours, theirs) = (ours?, theirs?);
        thread::Builder::new().name("vhost-requests".into()).spawn(move || {
            loop {
                match handler.handle_request() {
                    // The handler has replied with an error to an unsupported request.
                    Ok(_) | Err(ProtocolError::ReqHandlerError(_)) => {}
                    Err(error) => {
                        return log::debug!("cannot receive requests of a back-end: {error}");
                    }
                }
            }
        })?;
        Ok((Requests(UnixStream::from(ours)), theirs))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // This ends the thread. It fails only if the connection is already closed.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::mpsc;

    /// The header of a request: its number, the flags (version 1, reply wanted), payload length.
    fn request(number: u32) -> Vec<u8> {
        [number, 1 | 8, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads a reply; returns the number of the request that it answers, and its value.
    fn reply(stream: &mut UnixStream) -> (u8, u64) {
        let mut bytes = [0; 20];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[4], 1 | 4, "version 1, a reply");
        (bytes[0], u64::from_le_bytes(bytes[12..].try_into().unwrap()))
    }

    #[test]
    fn config_changes_are_reported_and_answered_until_dropped() {
        const CONFIG_CHANGE: u32 = 2;
        let (sender, heard) = mpsc::channel();
        let (requests, theirs) = Requests::serve(move || sender.send(()).unwrap()).unwrap();
        let mut stream = UnixStream::from(theirs);
        for _ in 0..2 {
            stream.write_all(&request(CONFIG_CHANGE)).unwrap();
            assert_eq!(reply(&mut stream), (2, 0));
            heard.try_recv().unwrap();
        }
        drop(requests);
        // The thread has ended and dropped its callback.
        heard.recv().unwrap_err();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}
