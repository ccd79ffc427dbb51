// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end that implements the vhost-user protocol by hand, and violates it where its deed says
//! so.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use demand_memory::to_usize;
use demand_uffd::{Features, Userfaultfd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::deed::{Base, Deed, Mischief, Sent, Step, Wrong};
use super::memory::{self, Guarded, tempfile_of};

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_MEM_TABLE: u32 = 5;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;
const ADVISE: u32 = 28;
pub(crate) const END: u32 = 30;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;

pub(crate) const MQ: u64 = 1;
pub(crate) const REPLY_ACK: u64 = 1 << 3;
pub(crate) const PAGEFAULT: u64 = 1 << 8;
pub(crate) const CONFIG: u64 = 1 << 9;
/// All protocol features that a front-end may require.
pub(crate) const ALL_FEATURES: u64 = MQ | REPLY_ACK | PAGEFAULT | CONFIG;

/// VIRTIO_F_VERSION_1 and PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// Number of sectors of the pretended disk.
const SECTORS: u64 = 1 << 40;
const NEED_REPLY: u32 = 8;

/// One connection with a front-end.
pub(crate) struct Connection {
    stream: UnixStream,
    deed: Deed,
    protocol_features: u64,
    uffd: Option<Arc<Userfaultfd>>,
    /// The memory objects from the front-end.
    files: Vec<File>,
    mappings: Arc<Mutex<Vec<Arc<Guarded>>>>,
    /// Whether the front-end has acknowledged the mappings' addresses, and whether it has sent a
    /// request since then.
    acknowledged: bool,
    begun: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, deed: Deed, protocol_features: u64) -> Self {
        Connection {
            stream,
            deed,
            protocol_features,
            uffd: None,
            files: Vec::new(),
            mappings: Arc::default(),
            acknowledged: false,
            begun: false,
        }
    }

    /// Returns the mappings of guest memory.
    pub(crate) fn mappings(&self) -> Arc<Mutex<Vec<Arc<Guarded>>>> {
        self.mappings.clone()
    }

    /// Serves the connection to its end; returns the requests received.
    pub(crate) fn serve(&mut self) -> Vec<u32> {
        let mut requests = Vec::new();
        if self.deed == Deed::FloodMessages {
            let answer = message(GET_FEATURES, &0u64.to_ne_bytes());
            while self.stream.write_all(&answer).is_ok() {}
            return requests;
        }
        while self.serve_one(&mut requests).is_some() {}
        requests
    }

    fn serve_one(&mut self, requests: &mut Vec<u32>) -> Option<()> {
        let (header, files) = self.receive()?;
        let [request, flags, size] = header;
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).ok()?;
        requests.push(request);
        let step = self.step(request, !files.is_empty());
        if step == Some(Step::MemAck) {
            self.acknowledged = true;
        }
        if step == Some(Step::Begin) {
            self.begun = true;
            self.use_memory();
        }
        let wrong = match self.deed {
            Deed::At(wrong, at) if step == Some(at) => Some(wrong),
            _ => None,
        };
        match wrong {
            Some(Wrong::Silent) => return self.wait(),
            Some(Wrong::HangUp) => return None,
            Some(Wrong::Refuse) => return self.refuse(request, flags),
            _ => {}
        }
        let mut fds = Vec::new();
        let answer = match request {
            ADVISE => {
                fds = self.advise();
                Some(Vec::new())
            }
            GET_CONFIG => {
                let room = payload.len() - 12;
                let config = SECTORS.to_le_bytes().into_iter().chain(std::iter::repeat(0));
                payload.splice(12.., config.take(room));
                Some(payload)
            }
            SET_MEM_TABLE if !files.is_empty() && self.uffd.is_some() => {
                let which = if let Deed::Base(base) = self.deed { Some(base) } else { None };
                Some(self.mem_table(&payload, files, which))
            }
            // The region is described as in a table, after padding in place of the count.
            ADD_MEM_REG if !files.is_empty() && self.uffd.is_some() => {
                let which = if let Deed::Added(base) = self.deed { Some(base) } else { None };
                Some(self.mem_table(&payload, files, which))
            }
            _ => self
                .value(request)
                .map(|value| value.to_ne_bytes().to_vec())
                .or_else(|| (flags & NEED_REPLY != 0).then(|| 0u64.to_ne_bytes().to_vec())),
        };
        let Some(answer) = answer else { return Some(()) };
        self.answer(request, &answer, fds, wrong)
    }

    /// Receives the header of the next request, and its files.
    fn receive(&mut self) -> Option<([u32; 3], Vec<File>)> {
        let mut header = [0u32; 3];
        let mut fds = [0 as RawFd; 8];
        let len = size_of_val(&header);
        let mut iovec = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: len }];
        // SAFETY: `iovec` describes `header`, which outlives the call.
        let (read, count) = unsafe { self.stream.recv_with_fds(&mut iovec, &mut fds) }.ok()?;
        // SAFETY: the kernel has just installed these descriptors, so no other code owns them.
        let files = fds[..count].iter().map(|fd| unsafe { File::from_raw_fd(*fd) }).collect();
        (read == len).then_some((header, files))
    }

    /// Returns the step that a request belongs to.
    fn step(&self, request: u32, files: bool) -> Option<Step> {
        Some(match request {
            GET_FEATURES if self.acknowledged && !self.begun => Step::Begin,
            GET_FEATURES => Step::GetFeatures,
            2 => Step::SetFeatures,
            SET_MEM_TABLE if files => Step::MemTable,
            SET_MEM_TABLE => Step::MemAck,
            8 => Step::VringNum,
            9 => Step::VringAddr,
            10 => Step::VringBase,
            11 => Step::GetVringBase,
            12 => Step::VringKick,
            13 => Step::VringCall,
            GET_PROTOCOL_FEATURES => Step::GetProtocolFeatures,
            17 => Step::GetQueueNum,
            18 => Step::VringEnable,
            GET_CONFIG => Step::GetConfig,
            ADVISE => Step::Advise,
            29 => Step::Listen,
            END => Step::End,
            ADD_MEM_REG if files => Step::AddRegion,
            _ => return None,
        })
    }

    /// Returns the right answer to a request whose answer is a number.
    fn value(&self, request: u32) -> Option<u64> {
        match request {
            GET_FEATURES if self.deed == Deed::NoProtocolFeatures => Some(0),
            GET_FEATURES => Some(FEATURES),
            GET_PROTOCOL_FEATURES => Some(self.protocol_features),
            // GET_QUEUE_NUM.
            17 => Some(1),
            GET_MAX_MEM_SLOTS => Some(3),
            // GET_VRING_BASE: the queue's index (low half) and its position in the available ring
            // (high half).
            11 => Some(0),
            _ => None,
        }
    }

    /// Reads without answering, until the front-end closes the connection.
    fn wait(&mut self) -> Option<()> {
        let mut rest = [0; 4096];
        while self.stream.read(&mut rest).ok()? > 0 {}
        None
    }

    fn refuse(&mut self, request: u32, flags: u32) -> Option<()> {
        let refusal = match request {
            ADVISE | SET_MEM_TABLE | ADD_MEM_REG => Vec::new(),
            GET_CONFIG => vec![0; 12],
            _ if self.value(request).is_some() => 0u64.to_ne_bytes().to_vec(),
            _ if flags & NEED_REPLY != 0 => 1u64.to_ne_bytes().to_vec(),
            _ => return Some(()),
        };
        self.stream.write_all(&message(request, &refusal)).ok()
    }

    fn answer(
        &mut self,
        request: u32,
        answer: &[u8],
        mut fds: Vec<OwnedFd>,
        wrong: Option<Wrong>,
    ) -> Option<()> {
        let mut bytes = message(request, answer);
        match wrong {
            Some(Wrong::Half) => {
                bytes.truncate(bytes.len() / 2);
                self.stream.write_all(&bytes).ok()?;
                return self.wait();
            }
            Some(Wrong::Long) => bytes = message(request, &[answer, &[0; 64]].concat()),
            Some(Wrong::Huge) => {
                bytes[8..12].fill(0xff);
                bytes.resize(1 << 20, 0);
            }
            Some(Wrong::Other) => bytes = message(request ^ 1, answer),
            Some(Wrong::Twice) => {
                self.send(&bytes, &fds)?;
                fds.clear();
            }
            Some(Wrong::Files) => fds.extend((0..4).map(|_| tempfile_of(4096).into())),
            Some(Wrong::Trickle) => {
                for byte in &bytes {
                    self.stream.write_all(&[*byte]).ok()?;
                    thread::sleep(Duration::from_secs(1));
                }
                return Some(());
            }
            _ => {}
        }
        self.send(&bytes, &fds)
    }

    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> Option<()> {
        if fds.is_empty() {
            return self.stream.write_all(bytes).ok();
        }
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.stream.send_with_fds(&[bytes], &fds).ok()?;
        self.stream.write_all(&bytes[sent..]).ok()
    }

    /// Returns the descriptors to send in place of a userfaultfd.
    fn advise(&mut self) -> Vec<OwnedFd> {
        let sent = if let Deed::Uffd(sent) = self.deed { Some(sent) } else { None };
        let uffd = Arc::new(match sent {
            Some(Sent::Plain) => Userfaultfd::open(Features::NONE).unwrap(),
            Some(Sent::Talkative) => Userfaultfd::open(
                Features::GUEST_MEMORY
                    | Features::EVENT_REMOVE
                    | Features::EVENT_UNMAP
                    | Features::EXACT_ADDRESS,
            )
            .unwrap(),
            _ => Userfaultfd::open(Features::GUEST_MEMORY).unwrap(),
        });
        let fd = uffd.try_clone_fd().unwrap();
        self.uffd = Some(uffd.clone());
        let pair = || UnixStream::pair().unwrap().0;
        match sent {
            Some(Sent::None) => vec![],
            Some(Sent::File) => vec![File::open("/proc/self/exe").unwrap().into()],
            Some(Sent::Pipe) => vec![std::io::pipe().unwrap().0.into()],
            Some(Sent::Memfd) => vec![tempfile_of(4096).into()],
            Some(Sent::Eventfd) => {
                let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
                // SAFETY: `into_raw_fd` has just passed on ownership of the descriptor.
                vec![unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }]
            }
            Some(Sent::Socket) => vec![pair().into()],
            Some(Sent::Two) => vec![fd, pair().into()],
            Some(Sent::Raw) => vec![raw_uffd()],
            Some(Sent::Dead) => vec![dead_uffd()],
            Some(Sent::Closed) => {
                uffd.close();
                vec![fd]
            }
            _ => vec![fd],
        }
    }

    /// Maps the regions and returns the answer to a memory table.
    fn mem_table(&mut self, payload: &[u8], files: Vec<File>, which: Option<Base>) -> Vec<u8> {
        // The layout is a count and padding, and for each region: guest address, size, user
        // address, offset.
        let mut table: Vec<u64> =
            payload.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
        for (index, file) in files.iter().enumerate() {
            let region = 1 + index * 4;
            let len = table[region + 1];
            let mapping = Arc::new(match which {
                Some(Base::Another) => Guarded::new(&tempfile_of(len), len),
                _ => Guarded::new(file, len),
            });
            if let Deed::Memory(what) = self.deed {
                memory::prefault(what, &mapping);
            }
            let base = mapping.base();
            let mut mappings = self.mappings.lock().unwrap();
            mappings.push(mapping);
            table[region + 2] = match which {
                Some(Base::Echo) => table[region + 2],
                Some(Base::Unaligned) => base + 2048,
                Some(Base::Overlap) => mappings[0].base(),
                Some(Base::PastTheEnd) => !0xfff,
                Some(Base::Unmapped) => 0x1000_0000_0000 + region as u64 * (1 << 32),
                Some(Base::Zero) => 0,
                Some(Base::Private) => memory::reserve(to_usize(len)) as u64,
                _ => base,
            };
        }
        self.files.extend(files);
        match which {
            Some(Base::TooFew) => {
                table[0] = 1;
                table.truncate(5);
            }
            Some(Base::OtherRegions) => table[1] += 4096,
            _ => {}
        }
        table.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Performs the deed's part that begins as soon as memory may be used.
    ///
    /// A flood runs for some time before the front-end's request is answered.
    fn use_memory(&self) {
        let mappings = self.mappings.lock().unwrap().clone();
        let Some(uffd) = &self.uffd else { return };
        for (mapping, file) in mappings.iter().zip(&self.files) {
            match self.deed {
                Deed::Base(Base::Moving) => memory::move_later(mapping),
                // Never served, because the mapping contains no guest memory.
                Deed::Base(Base::Another) => memory::insist(mapping, uffd),
                Deed::Memory(what) => memory::mischief(what, mapping, file, uffd),
                _ => {}
            }
        }
        if self.deed == Deed::Uffd(Sent::Blocking) {
            // The flag belongs to the open file description, which the front-end's descriptor
            // shares.
            let ours = uffd.try_clone_fd().unwrap();
            memory::for_a_while(move |_| {
                // SAFETY: fcntl with this command accesses no memory.
                unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, 0) };
            });
        }
        if matches!(
            self.deed,
            Deed::Memory(Mischief::Flood | Mischief::FloodOutside) | Deed::Base(Base::Another)
        ) {
            thread::sleep(Duration::from_secs(2));
        }
    }
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("payloads are short");
    // The flags: version 1, reply.
    let mut message = [request, 1 | 4, len].map(u32::to_ne_bytes).concat();
    message.extend(payload);
    message
}

/// Creates a userfaultfd without initialising it.
fn raw_uffd() -> OwnedFd {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call only takes flags, and accesses no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    let fd = RawFd::try_from(fd).expect("a descriptor");
    // SAFETY: the call has just returned this descriptor, so no other code owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Returns a userfaultfd of a process that has ended.
fn dead_uffd() -> OwnedFd {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    // SAFETY: the child only makes system calls until it exits.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let sent = Userfaultfd::open(Features::GUEST_MEMORY)
            .ok()
            .and_then(|uffd| uffd.try_clone_fd().ok())
            .and_then(|fd| theirs.send_with_fd(&[0u8; 1][..], fd.as_raw_fd()).ok());
        // SAFETY: this ends the child, which has nothing to clean up.
        unsafe { libc::_exit(i32::from(sent.is_none())) };
    }
    let (read, file) = ours.recv_with_fd(&mut [0]).unwrap();
    assert_eq!(read, 1);
    // SAFETY: the process is our child, no other thread waits for it, and a null status is allowed.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    let _ = ours.flush();
    file.unwrap().into()
}
