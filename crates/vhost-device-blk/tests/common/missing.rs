// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest whose memory is still missing, and a server for the back-end's faults.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use userfaultfd::{Event, Uffd};
use vhost::VhostBackend;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::*;

/// Prints SKIPPED with the reason and returns from the test if no userfaultfd may be opened.
#[macro_export]
macro_rules! need_userfaultfd {
    () => {
        if let Err(error) = vhost_device_blk::postcopy::probe() {
            eprintln!("SKIPPED: {error}");
            return;
        }
    };
}

/// Returns the content of a page: its page number and a mark.
pub fn content(addr: u64) -> Vec<u8> {
    (addr / PAGE * 0x1_0001 + 0xabcd).to_le_bytes().repeat(PAGE as usize / 8)
}

/// Serves the back-end's faults, except on held pages.
pub struct Server {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Guest addresses of the pages held back.
    held: Arc<Mutex<HashSet<u64>>>,
    /// Guest addresses of faults, in order.
    seen: Arc<Mutex<Vec<u64>>>,
}

/// The back-end's mappings: host address in the back-end, guest address, size.
pub type Mappings = Arc<Mutex<Vec<(u64, u64, u64)>>>;

impl Server {
    pub fn start(uffd: RawFd, mappings: Mappings) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let held = Arc::new(Mutex::new(HashSet::new()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop2, held2, seen2) = (stop.clone(), held.clone(), seen.clone());
        // SAFETY: the caller transfers ownership of the descriptor.
        let uffd = unsafe { Uffd::from_raw_fd(uffd) };
        let thread = thread::spawn(move || {
            let mut waiting: Vec<(u64, u64)> = Vec::new();
            while !stop2.load(Ordering::SeqCst) {
                while let Some(event) = uffd.read_event().unwrap() {
                    let Event::Pagefault { addr, .. } = event else {
                        panic!("{event:?}");
                    };
                    let addr = addr as u64 & !(PAGE - 1);
                    let mappings = mappings.lock().unwrap();
                    let (base, gpa, _) = *mappings
                        .iter()
                        .find(|(base, _, size)| (*base..base + size).contains(&addr))
                        .expect("a fault outside of guest memory");
                    seen2.lock().unwrap().push(addr - base + gpa);
                    waiting.push((addr, addr - base + gpa));
                }
                waiting.retain(|(addr, gpa)| {
                    if held2.lock().unwrap().contains(gpa) {
                        return true;
                    }
                    let page = content(*gpa);
                    // SAFETY: it copies a page of our memory into a missing page of the back-end's.
                    let copied = unsafe {
                        uffd.copy(page.as_ptr().cast(), *addr as *mut _, PAGE as usize, true)
                    };
                    // Two threads may fault on one page.
                    if copied.is_err() {
                        uffd.wake(*addr as *mut _, PAGE as usize).unwrap();
                    }
                    false
                });
                thread::sleep(Duration::from_micros(200));
            }
        });
        Server { thread: Some(thread), stop, held, seen }
    }

    pub fn hold(&self, addr: u64) {
        self.held.lock().unwrap().insert(addr & !(PAGE - 1));
    }

    pub fn release(&self, addr: u64) {
        self.held.lock().unwrap().remove(&(addr & !(PAGE - 1)));
    }

    pub fn seen(&self, addr: u64) -> bool {
        self.seen.lock().unwrap().contains(&(addr & !(PAGE - 1)))
    }

    pub fn await_fault(&self, addr: u64) {
        until("the fault", || self.seen(addr));
    }
}

impl Drop for Server {
    /// Stops the thread and closes the userfaultfd.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Err(error) = self.thread.take().unwrap().join()
            && !thread::panicking()
        {
            std::panic::resume_unwind(error);
        }
    }
}

/// Connects a guest whose memory is missing except for its rings.
pub fn restore(daemon: &Daemon, queues: usize) -> (Guest, Server) {
    restore_at(&daemon.socket(), queues)
}

/// Like [`restore`], given the socket's path.
pub fn restore_at(socket: &Path, queues: usize) -> (Guest, Server) {
    restore_on(Frontend::connect(socket, 64).unwrap(), queues)
}

/// Like [`restore`], on an existing connection.
pub fn restore_on(frontend: Frontend, queues: usize) -> (Guest, Server) {
    let none = VhostUserProtocolFeatures::empty();
    let (mut frontend, features, protocol) = negotiate_on(frontend, 0, none);
    assert!(protocol.contains(VhostUserProtocolFeatures::PAGEFAULT));
    let uffd = frontend.postcopy_advise().unwrap();
    frontend.postcopy_listen().unwrap();
    let mem = memory();
    let bases = if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        let mut bases = vec![];
        for region in region_infos(&mem) {
            bases.push(frontend.add_mem_region(&region).unwrap().unwrap());
        }
        frontend.postcopy_ack_mem_regions(FrontendReq::ADD_MEM_REG).unwrap();
        bases
    } else {
        let bases = frontend.set_mem_table(&region_infos(&mem)).unwrap().unwrap();
        frontend.postcopy_ack_mem_regions(FrontendReq::SET_MEM_TABLE).unwrap();
        bases
    };
    assert_eq!(bases.len(), 2);
    let gpas = [BASE, BASE + REGION];
    let mappings = bases.into_iter().zip(gpas).map(|(base, gpa)| (base, gpa, REGION)).collect();
    let server = Server::start(uffd.into_raw_fd(), Arc::new(Mutex::new(mappings)));
    let mut guest = Guest { frontend, features, protocol, mem, rings: Vec::new() };
    for _ in 0..queues {
        guest.add_ring();
    }
    (guest, server)
}

/// Returns whether a page of the first region is in its file.
pub fn present(mem: &GuestMemoryMmap, addr: u64) -> bool {
    let file = mem.iter().next().unwrap().file_offset().unwrap().file();
    let offset = (addr - BASE) as i64;
    // SAFETY: only the file's position changes, which no other code uses.
    unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) == offset }
}
