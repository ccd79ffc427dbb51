// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves a front-end whose socket is already connected.
//!
//! The library accepts connections only from a listener. So this module listens on a private
//! address, connects to it, and passes the messages of the vhost-user channel, with their
//! descriptors, between the front-end and that connection. Requests of the disk do not pass here.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{Error, Result};

/// The size of a message's header: request, flags and size of the body, 32 bits each.
const HEADER: usize = 12;
/// The maximum size of a body. The library ends the connection at a header that exceeds it.
const MAX_BODY: usize = 4096;
/// The maximum number of descriptors of a message.
const MAX_DESCRIPTORS: usize = 32;

/// Returns a listener on which `front_end` is pending.
///
/// # Errors
/// [`Error::System`] if the host has no sockets or threads left.
pub(crate) fn listener_for(front_end: UnixStream) -> Result<UnixListener> {
    let failed = Error::system("pass on the messages of the inherited socket");
    // An address that no other process can guess, so that none connects first.
    let unique = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(&failed)?;
    let address = SocketAddr::from_abstract_name(format!("vhost-device-blk {}", unique.trim()));
    let address = address.map_err(&failed)?;
    let listener = UnixListener::bind_addr(&address).map_err(&failed)?;
    let library = UnixStream::connect_addr(&address).map_err(&failed)?;
    for (name, from, to) in
        [("to the device", &front_end, &library), ("to the front-end", &library, &front_end)]
    {
        let (from, to) = (from.try_clone().map_err(&failed)?, to.try_clone().map_err(&failed)?);
        thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                if let Err(error) = pass_on(&from, &to) {
                    log::debug!("messages are no longer passed on: {error}");
                }
                let _ = to.shutdown(Shutdown::Write);
                let _ = from.shutdown(Shutdown::Read);
            })
            .map_err(&failed)?;
    }
    Ok(listener)
}

/// Passes on messages until `from` is closed. One message is passed on at a time, because the
/// kernel may merge what is read at once and would then attach descriptors to the wrong one.
fn pass_on(mut from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    loop {
        let mut message = vec![0; HEADER];
        let (begun, descriptors) = receive(from, &mut message)?;
        let mut filled = begun;
        while filled > 0 && filled < HEADER {
            match from.read(&mut message[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        message.truncate(filled);
        if let Some(size) = message.get(8..HEADER) {
            let size = u32::from_ne_bytes(size.try_into().expect("it has 4 bytes")) as usize;
            if size <= MAX_BODY {
                io::Read::by_ref(&mut from).take(size as u64).read_to_end(&mut message)?;
            }
        }
        if message.is_empty() {
            return Ok(());
        }
        send(to, &message, &descriptors)?;
    }
}

/// Receives up to `buffer.len()` bytes, and the descriptors attached to them.
pub(crate) fn receive(from: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let parts = &mut [IoSliceMut::new(buffer)];
        recvmsg(from, parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut descriptors = vec![];
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((received.bytes, descriptors))
}

/// Sends all of `bytes`, with descriptors attached to the first of them.
pub(crate) fn send(to: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let mut sent = 0;
    while sent < bytes.len() {
        sent += rustix::io::retry_on_intr(|| {
            sendmsg(to, &[IoSlice::new(&bytes[sent..])], &mut control, SendFlags::NOSIGNAL)
        })?;
        control.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn message(request: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(body.len()).unwrap();
        let header = [request, 1, size].map(u32::to_ne_bytes).concat();
        [&header[..], body].concat()
    }

    #[test]
    fn descriptors_stay_with_their_messages() {
        let (front_end, ours) = UnixStream::pair().unwrap();
        let listener = listener_for(ours).unwrap();
        let (library, _) = listener.accept().unwrap();
        // Sent before the relay reads them, so that it finds them side by side.
        let (one, two) = (message(1, &[]), message(2, b"with a descriptor"));
        send(&front_end, &one, &[]).unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        send(&front_end, &two, &[reader.into()]).unwrap();
        for (sent, count) in [(one, 0), (two, 1)] {
            let mut buffer = vec![0; HEADER];
            let (n, descriptors) = receive(&library, &mut buffer).unwrap();
            assert_eq!((n, descriptors.len()), (HEADER, count));
            buffer.resize(sent.len(), 0);
            (&library).read_exact(&mut buffer[HEADER..]).unwrap();
            assert_eq!(buffer, sent);
            if let Some(reader) = descriptors.into_iter().next() {
                writer.write_all(b"x").unwrap();
                let mut byte = [0];
                io::PipeReader::from(reader).read_exact(&mut byte).unwrap();
            }
        }
        // The other direction, and the end.
        send(&library, &message(3, b"reply"), &[]).unwrap();
        let mut buffer = vec![0; HEADER + 5];
        (&front_end).read_exact(&mut buffer).unwrap();
        assert_eq!(buffer, message(3, b"reply"));
        drop(front_end);
        assert_eq!((&library).read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn cut_off_and_oversized_messages_are_passed_on() {
        for bytes in [&message(1, b"body")[..14], &[0xff; 40], &[1, 2, 3]] {
            let (mut front_end, ours) = UnixStream::pair().unwrap();
            let (library, _) = listener_for(ours).unwrap().accept().unwrap();
            front_end.write_all(bytes).unwrap();
            drop(front_end);
            let mut received = vec![];
            let _ = (&library).read_to_end(&mut received);
            assert_eq!(received, bytes);
        }
    }
}
