// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a back-end asks of the front-end, over a connection of its own.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use vhost::vhost_user::{
    Error as ProtocolError, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler,
};

/// The only request that is served: the configuration is another.
struct Changed<F>(F);

impl<F: Fn() + Send + Sync> VhostUserFrontendReqHandler for Changed<F> {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        (self.0)();
        Ok(0)
    }
}

/// Serves a back-end's requests until it is dropped.
pub(crate) struct Requests(UnixStream);

impl Requests {
    /// Starts the thread; returns also what the back-end is to be given.
    pub(crate) fn serve(changed: impl Fn() + Send + Sync + 'static) -> io::Result<(Self, OwnedFd)> {
        let handler = FrontendReqHandler::new(Arc::new(Changed(changed)));
        let mut handler = handler.map_err(io::Error::other)?;
        // REPLY_ACK is always agreed on.
        handler.set_reply_ack_flag(true);
        let [ours, theirs] = [handler.as_raw_fd(), handler.get_tx_raw_fd()].map(|fd| {
            // SAFETY: both are the handler's, which keeps them open for longer than this.
            unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
        });
        let (ours, theirs) = (ours?, theirs?);
        thread::Builder::new().name("vhost-requests".into()).spawn(move || {
            loop {
                match handler.handle_request() {
                    // What is not served was answered so.
                    Ok(_) | Err(ProtocolError::ReqHandlerError(_)) => {}
                    Err(error) => return log::debug!("a back-end's requests end: {error}"),
                }
            }
        })?;
        Ok((Requests(UnixStream::from(ours)), theirs))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // That ends the thread. It fails only if the connection is down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
