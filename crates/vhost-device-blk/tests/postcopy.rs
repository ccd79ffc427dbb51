// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Post-copy: the front-end under test shares memory that is not there yet, and serves the faults.
//! Needs /dev/userfaultfd; says so and passes where it may not be opened.

mod common;

use std::collections::HashSet;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::*;
use userfaultfd::{Event, Uffd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

macro_rules! need_userfaultfd {
    () => {
        if let Err(e) = vhost_device_blk::postcopy::probe() {
            eprintln!("SKIPPED: {e}");
            return;
        }
    };
}

/// What a missing page holds once it arrives: its page number and a mark.
fn content(addr: u64) -> Vec<u8> {
    (addr / PAGE * 0x1_0001 + 0xabcd).to_le_bytes().repeat(PAGE as usize / 8)
}

/// Serves the back-end's faults, but for pages it is told to hold back.
struct Server {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Guest addresses of pages not to be given yet.
    held: Arc<Mutex<HashSet<u64>>>,
    /// Guest addresses of faults, in order.
    seen: Arc<Mutex<Vec<u64>>>,
}

/// The back-end's mappings: its base, the guest address, the size.
type Mappings = Arc<Mutex<Vec<(u64, u64, u64)>>>;

impl Server {
    fn start(uffd: RawFd, mappings: Mappings) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let held = Arc::new(Mutex::new(HashSet::new()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop2, held2, seen2) = (stop.clone(), held.clone(), seen.clone());
        // SAFETY: the caller hands the descriptor over.
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
                    // SAFETY: a page of ours into a page of the back-end's that is missing.
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

    fn hold(&self, addr: u64) {
        self.held.lock().unwrap().insert(addr & !(PAGE - 1));
    }

    fn release(&self, addr: u64) {
        self.held.lock().unwrap().remove(&(addr & !(PAGE - 1)));
    }

    fn seen(&self, addr: u64) -> bool {
        self.seen.lock().unwrap().contains(&(addr & !(PAGE - 1)))
    }

    fn await_fault(&self, addr: u64) {
        until("the fault", || self.seen(addr));
    }
}

impl Drop for Server {
    /// Stops, and closes the userfaultfd.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Err(e) = self.thread.take().unwrap().join()
            && !thread::panicking()
        {
            std::panic::resume_unwind(e);
        }
    }
}

/// Connects a guest whose memory is missing, its rings excepted.
fn restore(daemon: &Daemon, queues: usize) -> (Guest, Server) {
    let none = VhostUserProtocolFeatures::empty();
    let (mut frontend, features, protocol) = negotiate(&daemon.socket(), 0, none);
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

/// Whether a page of the first region is in its file.
fn present(mem: &GuestMemoryMmap, addr: u64) -> bool {
    let file = mem.iter().next().unwrap().file_offset().unwrap().file();
    let offset = (addr - BASE) as i64;
    // SAFETY: only the file's position is changed, which nobody uses.
    unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) == offset }
}

fn writes_and_reads(args: &[&str]) {
    let mut daemon = Daemon::start(4096, &[args, &["--postcopy", "require", "--once"]].concat());
    let (mut guest, server) = restore(&daemon, 1);

    // A page that nobody has touched goes to the disk: fetched, not zeros.
    assert!(!present(&guest.mem, DATA));
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(daemon.disk()[8 * 512..16 * 512], content(DATA));
    assert!(server.seen(DATA) && present(&guest.mem, DATA));

    // Read into half of a missing page: its other half is there, too.
    let half = DATA + 16 * PAGE;
    assert_eq!(guest.request(0, T_IN, 0, half, 2048), (OK, 2049));
    assert_eq!(guest.bytes(half, 512), [0; 512]);
    assert_eq!(guest.bytes(half + 1536, 512), [3; 512]);
    assert_eq!(guest.bytes(half + 2048, 2048), content(half)[2048..]);

    // Requests that are no page's multiple and cross from one region to the other.
    let seam = BASE + REGION - 3 * PAGE - 100;
    assert_eq!(guest.request(0, T_OUT, 100, seam, 6 * 4096), (OK, 1));
    let mut wanted: Vec<u8> = (0..8).flat_map(|i| content(seam + i * PAGE)).collect();
    wanted.drain(..PAGE as usize - 100);
    wanted.truncate(6 * 4096);
    assert_eq!(daemon.disk()[100 * 512..148 * 512], wanted);

    // The end: what was not touched is given at once, and the guest goes on without faults.
    let late = DATA + 100 * PAGE;
    let file = guest.mem.iter().next().unwrap().file_offset().unwrap().file();
    file.write_all_at(&content(late), late - BASE).unwrap();
    guest.frontend.postcopy_end().unwrap();
    drop(server);
    assert_eq!(guest.request(0, T_OUT, 200, late, 4096), (OK, 1));
    assert_eq!(daemon.disk()[200 * 512..208 * 512], content(late));

    drop(guest);
    assert!(daemon.wait().success());
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn missing_memory_is_fetched() {
    need_userfaultfd!();
    writes_and_reads(&[]);
}

#[test]
fn missing_memory_is_fetched_with_memory_slots() {
    need_userfaultfd!();
    writes_and_reads(&["--mem-slots", "on"]);
}

/// The disk's inode is locked by whoever writes: not while a page is waited for.
#[test]
fn queues_do_not_wait_for_each_others_pages() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &["--num-queues", "3"]);
    let (mut guest, server) = restore(&daemon, 3);
    let (to_disk, from_disk) = (DATA, DATA + 8 * PAGE);
    // The second of four pages, in both directions.
    server.hold(to_disk + PAGE);
    server.hold(from_disk + PAGE);
    let mem = guest.mem.clone();
    let write = guest.rings[0].submit(&mem, T_OUT, 64, &[(to_disk, 4 * 4096)]);
    let read = guest.rings[1].submit(&mem, T_IN, 0, &[(from_disk, 4 * 4096)]);
    server.await_fault(to_disk + PAGE);
    server.await_fault(from_disk + PAGE);

    let start = Instant::now();
    for i in 0..20 {
        let addr = DATA + (32 + i) * PAGE;
        assert_eq!(guest.request(2, T_OUT, 1000 + i * 8, addr, 4096), (OK, 1));
        assert_eq!(guest.request(2, T_IN, 64, addr + 64 * PAGE, 4096), (OK, 4097));
        assert_eq!(guest.request(2, T_FLUSH, 0, 0, 0), (OK, 1));
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(guest.rings[0].used_index(&mem), 0);
    assert_eq!(guest.rings[1].used_index(&mem), 0);
    // Messages about other queues are answered meanwhile.
    guest.frontend.get_vring_base(2).unwrap();

    server.release(to_disk + PAGE);
    assert_eq!(guest.rings[0].wait(&mem), (u32::from(write), 1));
    server.release(from_disk + PAGE);
    assert_eq!(guest.rings[1].wait(&mem), (u32::from(read), 4 * 4096 + 1));
    let wanted: Vec<u8> = (0..4).flat_map(|i| content(to_disk + i * PAGE)).collect();
    assert_eq!(daemon.disk()[64 * 512..96 * 512], wanted);
}

/// What waits for a page when the front-end dies never sees zeros, and does not hold up the next.
#[test]
fn a_front_end_that_dies_in_a_fault() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &["--num-queues", "2"]);
    let before = daemon.disk();
    let (mut guest, server) = restore(&daemon, 2);
    let mem = guest.mem.clone();
    server.hold(DATA + PAGE);
    guest.rings[0].submit(&mem, T_OUT, 64, &[(DATA, 4 * 4096)]);
    server.await_fault(DATA + PAGE);
    // The userfaultfd first, then the connection; as when a process is killed.
    drop(server);
    drop(guest);

    let start = Instant::now();
    let (mut guest, _server) = restore(&daemon, 2);
    assert_eq!(guest.request(0, T_IN, 64, DATA, 512), (OK, 513));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(daemon.disk(), before);
    assert!(!present(&mem, DATA + PAGE), "somebody went on over a hole");
}

/// SET_VRING_ADDR reads the ring, in the thread that handles messages.
#[test]
fn a_front_end_that_dies_in_a_message() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &[]);
    let (guest, server) = restore(&daemon, 0);
    let ring = DATA + 50 * PAGE;
    server.hold(ring);
    let host = guest.mem.get_host_address(GuestAddress(ring)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: 4,
        queue_size: 4,
        flags: 0,
        desc_table_addr: host,
        avail_ring_addr: host + 64,
        used_ring_addr: host + 128,
        log_addr: None,
    };
    // Asked for now: the front-end is locked while it waits.
    let socket = guest.frontend.as_raw_fd();
    let frontend = guest.frontend.clone();
    let waits = thread::spawn(move || frontend.set_vring_addr(0, &config).is_err());
    server.await_fault(ring);
    drop(server);
    // SAFETY: our own socket.
    unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
    assert!(waits.join().unwrap());
    drop(guest);

    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
}

/// The daemon ends when asked to, even in a fault.
#[test]
fn ends_in_a_fault() {
    need_userfaultfd!();
    let mut daemon = Daemon::start(4096, &[]);
    let before = daemon.disk();
    let (mut guest, server) = restore(&daemon, 1);
    let mem = guest.mem.clone();
    server.hold(DATA);
    guest.rings[0].submit(&mem, T_OUT, 64, &[(DATA, 4096)]);
    server.await_fault(DATA);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert_eq!(daemon.disk(), before);
    assert!(!daemon.socket().exists());
}

/// Two post-copies in a row, each on a connection of its own.
#[test]
fn again_and_again() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &[]);
    for i in 0..3 {
        let (mut guest, _server) = restore(&daemon, 1);
        let addr = DATA + i * PAGE;
        assert_eq!(guest.request(0, T_OUT, 8 * i, addr, 4096), (OK, 1));
        let at = i as usize * 4096;
        assert_eq!(daemon.disk()[at..at + 4096], content(addr));
    }
}
