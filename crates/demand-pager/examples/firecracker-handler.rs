// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A page fault handler as Firecracker's users write them: it receives a userfaultfd, and fills the
//! memory behind it with a file. Tests run it, also in ways in which handlers fail.
//!
//! usage: `firecracker-handler MEMORY SOCKET [page|everything|gives-up|never]`

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use demand_source::{MappedBytes, to_usize};
use demand_uffd::{Event, Userfaultfd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Signal, kill_process};
use serde::Deserialize;

/// A region of the message, with the fields that handlers read.
#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: usize,
    offset: u64,
    page_size: usize,
    page_size_kib: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (memory, socket, way) = match &arguments[..] {
        [memory, socket] => (memory, socket, "page"),
        [memory, socket, way] => (memory, socket, &**way),
        _ => panic!("usage: firecracker-handler MEMORY SOCKET [page|everything|gives-up|never]"),
    };
    let content = fs::read(memory).unwrap();
    // Left by a handler that was killed.
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let (message, uffd) = receive(&stream);
    let regions: Vec<Region> = serde_json::from_slice(&message).unwrap();
    let page_size = regions[0].page_size;
    assert_eq!(regions.iter().map(|region| region.size).sum::<usize>(), content.len());
    assert!(regions.iter().all(|region| region.page_size_kib == page_size));
    let uffd = Userfaultfd::from_received(uffd).unwrap();
    if way == "never" {
        loop {
            std::thread::park();
        }
    }
    let copy = |address: u64| {
        let inside = |region: &&Region| {
            (region.base_host_virt_addr..region.base_host_virt_addr + region.size as u64)
                .contains(&address)
        };
        let region = regions.iter().find(inside).expect("a fault in a region");
        let address = address & !(page_size as u64 - 1);
        let at = to_usize(address - region.base_host_virt_addr + region.offset);
        let bytes = MappedBytes::owned(content[at..at + page_size].to_vec());
        // SAFETY: the userfaultfd is of another process.
        match unsafe { uffd.copy(address, bytes) } {
            Ok(()) => {}
            // Another fault was faster; or the source has ended.
            Err(_) => drop(uffd.wake(address, page_size as u64)),
        }
    };
    let mut faults = 0;
    loop {
        let mut events = Vec::new();
        let descriptor = uffd.try_clone_fd().unwrap();
        poll(&mut [PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN)], None).unwrap();
        uffd.read(&mut events).unwrap();
        for event in events {
            let Event::Pagefault { address, .. } = event else {
                panic!("only faults are announced: {event:?}");
            };
            faults += 1;
            match way {
                "everything" => {
                    for region in &regions {
                        let start = region.base_host_virt_addr;
                        (start..start + region.size as u64).step_by(page_size).for_each(copy);
                    }
                }
                // As Firecracker's examples do when they panic.
                "gives-up" if faults > 20 => {
                    let peer = socket_peercred(&stream).unwrap().pid;
                    kill_process(peer, Signal::KILL).unwrap();
                    std::process::exit(1);
                }
                _ => copy(address),
            }
        }
    }
}

/// Receives the one message: at most 1024 bytes, and a userfaultfd.
fn receive(stream: &UnixStream) -> (Vec<u8>, OwnedFd) {
    let mut message = vec![0; 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut message)];
    let received = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let passed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    message.truncate(received.bytes);
    (message, passed.expect("a userfaultfd is passed"))
}
