// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon under test, and a front-end with a driver for it.

#![allow(dead_code, unused_macros, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test binary")]

pub mod missing;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use test_support::wait::listens;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// The content of the status byte before the device answers.
pub const UNANSWERED: u8 = 0xee;

pub const PAGE: u64 = 4096;
/// Start of guest memory: not 0, so that addresses and offsets differ.
pub const BASE: u64 = 1 << 30;
/// Size of each of the two adjacent regions; each has a separate file.
pub const REGION: u64 = 8 << 20;
pub const QUEUE_SIZE: u16 = 64;
pub const PATIENCE: Duration = Duration::from_secs(10);

const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Headers and status bytes: 32 bytes for each descriptor.
const EXTRA: u64 = 0x3000;
const RING_SPACE: u64 = 0x4000;
/// Start of the memory that is free for data.
pub const DATA: u64 = BASE + 0x10_0000;

/// A running `vhost-device-blk`.
pub struct Daemon {
    pub process: Child,
    pub dir: tempfile::TempDir,
}

impl Daemon {
    /// Starts a daemon on a disk of `sectors` sectors, each filled with the low byte of its number.
    pub fn start(sectors: usize, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk: Vec<u8> = (0..sectors * 512).map(|i| (i / 512) as u8).collect();
        fs::write(dir.path().join("disk"), disk).unwrap();
        let process = spawn(dir.path(), args);
        let daemon = Daemon { process, dir };
        daemon.await_socket();
        daemon
    }

    pub fn await_socket(&self) {
        until("the socket", || listens(self.process.id()));
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn disk(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk")).unwrap()
    }

    pub fn stats(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.dir.path().join("stats")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: it is our own child, which has not been waited for yet.
        assert_eq!(unsafe { libc::kill(self.process.id() as i32, signal) }, 0);
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("the daemon to exit", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the daemon said:\n{}", self.stderr());
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts the binary on the disk and the socket in `dir`.
pub fn spawn(dir: &Path, args: &[&str]) -> Child {
    daemon_command(dir, args).spawn().unwrap()
}

/// Returns the command that [`spawn`] runs.
pub fn daemon_command(dir: &Path, args: &[&str]) -> Command {
    let mut command = command(dir, args);
    command.arg("--socket-path").arg(dir.join("socket"));
    command
}

/// Starts the binary on the disk in `dir`, with the socket `fd` as a descriptor.
pub fn spawn_with(fd: OwnedFd, dir: &Path, args: &[&str]) -> Child {
    let mut command = command(dir, args);
    pass(&mut command, fd);
    command.arg("--fd").arg(PASSED.to_string()).spawn().unwrap()
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let file = |name| dir.join(name);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-blk"));
    command.arg("--blk-file").arg(file("disk")).arg("--stats").arg(file("stats")).args(args);
    // Appended to, so that a test can empty it.
    let stderr = File::options().append(true).create(true).open(file("stderr")).unwrap();
    stderr.set_len(0).unwrap();
    command.stdin(Stdio::null()).stderr(stderr);
    command
}

/// The number under which [`pass`] passes a descriptor: none that a process has at its start.
const PASSED: i32 = 100;

/// Passes a descriptor to a program.
pub fn pass(command: &mut Command, fd: OwnedFd) {
    // SAFETY: the closure only makes a system call.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd.as_raw_fd(), PASSED) {
            PASSED => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// Waits for `condition`, and panics if it takes too long.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Creates a memfd of `size` bytes.
pub fn memfd(size: u64) -> File {
    // SAFETY: the name is a C string; the descriptor is new and has no other owner.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

/// Creates guest memory in two memfds.
pub fn memory() -> GuestMemoryMmap {
    let ranges = [BASE, BASE + REGION].map(|addr| {
        let file = FileOffset::new(memfd(REGION), 0);
        (GuestAddress(addr), REGION as usize, Some(file))
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

pub fn region_infos(mem: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter().map(|r| VhostUserMemoryRegionInfo::from_guest_region(r).unwrap()).collect()
}

/// Connects and negotiates. Returns the front-end and the negotiated features.
pub fn negotiate(
    socket: &Path,
    refuse: u64,
    refuse_protocol: VhostUserProtocolFeatures,
) -> (Frontend, u64, VhostUserProtocolFeatures) {
    let frontend = Frontend::connect(socket, 64).unwrap();
    negotiate_on(frontend, refuse, refuse_protocol)
}

/// Negotiates on a connection.
pub fn negotiate_on(
    mut frontend: Frontend,
    refuse: u64,
    refuse_protocol: VhostUserProtocolFeatures,
) -> (Frontend, u64, VhostUserProtocolFeatures) {
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap() & !refuse;
    let protocol = frontend.get_protocol_features().unwrap() - refuse_protocol;
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.get_queue_num().unwrap();
    // The log bit is for migrations.
    frontend.set_features(features & !(1 << 26)).unwrap();
    (frontend, features, protocol)
}

/// A front-end with its guest.
pub struct Guest {
    pub frontend: Frontend,
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    pub mem: GuestMemoryMmap,
    pub rings: Vec<Ring>,
}

impl Guest {
    /// Connects with all features, shares memory, and starts `queues` queues.
    pub fn connect(socket: &Path, queues: usize) -> Self {
        Self::connect_without(socket, queues, 0)
    }

    /// Like [`Guest::connect`], without some of the virtio features.
    pub fn connect_without(socket: &Path, queues: usize, refuse: u64) -> Self {
        Self::of(Frontend::connect(socket, 64).unwrap(), queues, refuse)
    }

    /// Like [`Guest::connect_without`], on an existing connection.
    pub fn of(frontend: Frontend, queues: usize, refuse: u64) -> Self {
        let none = VhostUserProtocolFeatures::empty();
        let (mut frontend, features, protocol) = negotiate_on(frontend, refuse, none);
        let mem = memory();
        if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for region in region_infos(&mem) {
                assert!(frontend.add_mem_region(&region).unwrap().is_none());
            }
        } else {
            frontend.set_mem_table(&region_infos(&mem)).unwrap();
        }
        let mut guest = Guest { frontend, features, protocol, mem, rings: Vec::new() };
        for _ in 0..queues {
            guest.add_ring();
        }
        guest
    }

    pub fn add_ring(&mut self) {
        let index = self.rings.len();
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let ring = Ring::new(&self.mem, index, event_idx);
        ring.start(&mut self.frontend, &self.mem, 0);
        self.rings.push(ring);
    }

    /// Submits a request with its data in one piece. Returns the status and the used length.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        addr: u64,
        len: u32,
    ) -> (u8, u32) {
        let data = if len == 0 { vec![] } else { vec![(addr, len)] };
        let head = self.rings[queue].submit(&self.mem, kind, sector, &data);
        let (id, used) = self.rings[queue].wait(&self.mem);
        assert_eq!(id, u32::from(head));
        (self.rings[queue].status(&self.mem, head), used)
    }

    /// Submits a discard or write zeroes request with ranges of (sector, number of sectors, flags).
    pub fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> (u8, u32) {
        let mut bytes = vec![];
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.request(0, kind, 0, DATA, bytes.len() as u32)
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.set_config(offset, flags, bytes).is_ok()
    }

    /// Ends the connection; the memory stays.
    pub fn hang_up(&self) {
        // SAFETY: the socket is our own, and still open.
        unsafe { libc::shutdown(self.frontend.as_raw_fd(), libc::SHUT_RDWR) };
    }

    pub fn fill(&self, addr: u64, len: usize, byte: u8) {
        self.mem.write_slice(&vec![byte; len], GuestAddress(addr)).unwrap();
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.frontend.get_config(offset, size, flags, &vec![0; size as usize]).unwrap().1
    }
}

/// Guest memory of any kind.
pub trait GuestBytes: Bytes<GuestAddress, E: std::fmt::Debug> {}

impl<M: Bytes<GuestAddress, E: std::fmt::Debug>> GuestBytes for M {}

/// A queue as seen by its driver.
pub struct Ring {
    pub index: usize,
    pub kick: EventFd,
    pub call: EventFd,
    base: u64,
    event_idx: bool,
    next_desc: u16,
    next_avail: u16,
    last_used: u16,
}

impl Ring {
    pub fn new(mem: &impl GuestBytes, index: usize, event_idx: bool) -> Self {
        let base = BASE + RING_SPACE * index as u64;
        assert!(base + RING_SPACE <= DATA);
        mem.write_slice(&[0; RING_SPACE as usize], GuestAddress(base)).unwrap();
        Ring {
            index,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            base,
            event_idx,
            next_desc: 0,
            next_avail: 0,
            last_used: 0,
        }
    }

    /// Starts the queue in the device at `avail_base`.
    pub fn start(&self, frontend: &mut Frontend, mem: &GuestMemoryMmap, avail_base: u16) {
        let host = |addr| mem.get_host_address(GuestAddress(addr)).unwrap() as u64;
        frontend.set_vring_num(self.index, QUEUE_SIZE).unwrap();
        frontend.set_vring_base(self.index, avail_base).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: host(self.base + DESC),
            used_ring_addr: host(self.base + USED),
            avail_ring_addr: host(self.base + AVAIL),
            log_addr: None,
        };
        frontend.set_vring_addr(self.index, &config).unwrap();
        frontend.set_vring_call(self.index, &self.call).unwrap();
        frontend.set_vring_kick(self.index, &self.kick).unwrap();
        frontend.set_vring_enable(self.index, true).unwrap();
    }

    /// Builds the next requests from this descriptor onwards, even if it is in use.
    pub fn reuse_from(&mut self, descriptor: u16) {
        self.next_desc = descriptor;
    }

    pub fn avail_addr(&self) -> u64 {
        self.base + AVAIL
    }

    pub fn used_addr(&self) -> u64 {
        self.base + USED
    }

    pub fn desc_addr(&self, index: u16) -> u64 {
        self.base + DESC + 16 * u64::from(index)
    }

    pub fn header_addr(&self, head: u16) -> u64 {
        self.base + EXTRA + 32 * u64::from(head)
    }

    pub fn status_addr(&self, head: u16) -> u64 {
        self.header_addr(head) + 16
    }

    pub fn status(&self, mem: &impl GuestBytes, head: u16) -> u8 {
        mem.read_obj(GuestAddress(self.status_addr(head))).unwrap()
    }

    /// Writes the header, and marks the status as unanswered.
    pub fn header(&self, mem: &impl GuestBytes, head: u16, kind: u32, sector: u64) {
        let at = |offset| GuestAddress(self.header_addr(head) + offset);
        mem.write_obj(u64::from(kind), at(0)).unwrap();
        mem.write_obj(sector, at(8)).unwrap();
        mem.write_obj(UNANSWERED, at(16)).unwrap();
    }

    /// Submits a request with header, data and status, and kicks. Returns its head.
    pub fn submit(
        &mut self,
        mem: &impl GuestBytes,
        kind: u32,
        sector: u64,
        data: &[(u64, u32)],
    ) -> u16 {
        let needed = data.len() as u16 + 2;
        let head = if self.next_desc + needed > QUEUE_SIZE { 0 } else { self.next_desc };
        self.next_desc = head + needed;
        self.header(mem, head, kind, sector);
        let to_device = [T_OUT, T_DISCARD, T_WRITE_ZEROES].contains(&kind);
        let flags = if to_device { NEXT } else { NEXT | WRITE };
        let mut chain = vec![(self.header_addr(head), 16, NEXT)];
        chain.extend(data.iter().map(|&(addr, len)| (addr, len, flags)));
        chain.push((self.status_addr(head), 1, WRITE));
        for (i, (addr, len, flags)) in chain.into_iter().enumerate() {
            let index = head + i as u16;
            self.descriptor(mem, index, Descriptor::new(addr, len, flags, index + 1));
        }
        self.publish(mem, head);
        head
    }

    pub fn descriptor(&self, mem: &impl GuestBytes, index: u16, descriptor: Descriptor) {
        mem.write_obj(descriptor, GuestAddress(self.desc_addr(index))).unwrap();
    }

    /// Puts a head on the available ring, and kicks.
    pub fn publish(&mut self, mem: &impl GuestBytes, head: u16) {
        let avail = self.base + AVAIL;
        let slot = 4 + 2 * u64::from(self.next_avail % QUEUE_SIZE);
        mem.write_obj(head, GuestAddress(avail + slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(mem, self.next_avail);
    }

    pub fn set_avail_index(&self, mem: &impl GuestBytes, index: u16) {
        let order = std::sync::atomic::Ordering::SeqCst;
        mem.store(index, GuestAddress(self.base + AVAIL + 2), order).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Requests a call for the completion with this index, counted from 0.
    pub fn set_used_event(&self, mem: &impl GuestBytes, index: u16) {
        let at = self.base + AVAIL + 4 + 2 * u64::from(QUEUE_SIZE);
        mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Returns the total number of completions that the device has published.
    pub fn used_index(&self, mem: &impl GuestBytes) -> u16 {
        let order = std::sync::atomic::Ordering::SeqCst;
        mem.load(GuestAddress(self.base + USED + 2), order).unwrap()
    }

    /// Returns the head and the length of the next completion, if any.
    pub fn poll(&mut self, mem: &impl GuestBytes) -> Option<(u32, u32)> {
        if self.used_index(mem) == self.last_used {
            return None;
        }
        let slot = self.base + USED + 4 + 8 * u64::from(self.last_used % QUEUE_SIZE);
        let id = mem.read_obj(GuestAddress(slot)).unwrap();
        let len = mem.read_obj(GuestAddress(slot + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            self.set_used_event(mem, self.last_used);
        }
        Some((id, len))
    }

    /// Waits for the call of the next completion, and returns the completion.
    pub fn wait(&mut self, mem: &impl GuestBytes) -> (u32, u32) {
        let mut fds = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the array is the one structure `fds`, which is ours.
        let n = unsafe { libc::poll(&mut fds, 1, PATIENCE.as_millis() as i32) };
        assert_eq!(n, 1, "no call for queue {}", self.index);
        self.call.read().unwrap();
        self.poll(mem).expect("a call without a completion")
    }
}
