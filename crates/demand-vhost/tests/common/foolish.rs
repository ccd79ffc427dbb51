// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end on a thread that speaks the protocol by hand, and wrongly where a test says so.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use demand_memory::Mapping;
use demand_uffd::{Features, Userfaultfd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const ADVISE: u32 = 28;
const LISTEN: u32 = 29;
const END: u32 = 30;

pub const REPLY_ACK: u64 = 1 << 3;
pub const PAGEFAULT: u64 = 1 << 8;

/// What a back-end does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folly {
    /// Nothing.
    None,
    /// Has no protocol features at all.
    NoProtocolFeatures,
    /// Sends no userfaultfd.
    NoUserfaultfd,
    /// Sends another file.
    AnotherFile,
    /// Refuses to listen.
    Refuses,
    /// Gives the front-end's addresses as its own.
    Echoes,
    /// Names an address in the middle of a page.
    Unaligned,
    /// Names one address for all regions.
    Overlaps,
    /// Names an address past which the region does not fit.
    PastTheEnd,
    /// Names an address where nothing is mapped.
    Unmapped,
    /// Names fewer regions than it was given.
    TooFew,
    /// Names regions that it was not given.
    OtherRegions,
    /// Closes the connection instead of naming its addresses.
    Closes,
    /// Never names its addresses.
    SaysNothing,
    /// Closes the connection instead of acknowledging the end.
    ClosesAtTheEnd,
}

pub struct Foolish {
    pub socket: PathBuf,
    pub mappings: Arc<Mutex<Vec<Mapping>>>,
    _directory: tempfile::TempDir,
    thread: Option<JoinHandle<Vec<u32>>>,
}

impl Foolish {
    pub fn start(folly: Folly, protocol_features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let mappings = Arc::new(Mutex::new(Vec::new()));
        let made = mappings.clone();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut back_end =
                Connection { stream, folly, protocol_features, uffd: None, mappings: made };
            let mut requests = Vec::new();
            while back_end.serve(&mut requests).is_some() {}
            requests
        });
        Foolish { socket, mappings, _directory: directory, thread: Some(thread) }
    }

    /// The requests that it got, once the front-end has hung up.
    pub fn requests(mut self) -> Vec<u32> {
        self.thread.take().unwrap().join().unwrap()
    }
}

struct Connection {
    stream: UnixStream,
    folly: Folly,
    protocol_features: u64,
    uffd: Option<Arc<Userfaultfd>>,
    mappings: Arc<Mutex<Vec<Mapping>>>,
}

fn words(payload: &[u8]) -> Vec<u64> {
    payload.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

impl Connection {
    fn serve(&mut self, requests: &mut Vec<u32>) -> Option<()> {
        let mut header = [0u8; 12];
        let mut fds = [0 as RawFd; 8];
        let mut iovec =
            [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
        // SAFETY: the vector describes `header`, which outlives the call.
        let (read, count) = unsafe { self.stream.recv_with_fds(&mut iovec, &mut fds) }.ok()?;
        if read != header.len() {
            return None;
        }
        // SAFETY: the kernel has just given us these descriptors.
        let files: Vec<_> =
            fds[..count].iter().map(|fd| unsafe { File::from_raw_fd(*fd) }).collect();
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (field(0), field(4));
        let mut payload = vec![0; field(8) as usize];
        self.stream.read_exact(&mut payload).ok()?;
        requests.push(request);
        match request {
            GET_FEATURES if self.folly == Folly::NoProtocolFeatures => self.reply_u64(request, 0),
            GET_FEATURES => self.reply_u64(request, 1 << 32 | 1 << 30),
            GET_PROTOCOL_FEATURES => self.reply_u64(request, self.protocol_features),
            GET_QUEUE_NUM => self.reply_u64(request, 1),
            ADVISE => self.advise(),
            SET_MEM_TABLE if !files.is_empty() && self.uffd.is_some() => {
                self.mem_table(&payload, files)
            }
            END if self.folly == Folly::ClosesAtTheEnd => None,
            LISTEN if self.folly == Folly::Refuses => self.reply_u64(request, 1),
            _ if flags & 8 != 0 => self.reply_u64(request, 0),
            _ => Some(()),
        }
    }

    fn advise(&mut self) -> Option<()> {
        let header = [ADVISE, 1 | 4, 0].map(u32::to_ne_bytes).concat();
        let uffd = Userfaultfd::open(Features::GUEST_MEMORY).unwrap();
        let fd = uffd.try_clone_fd().unwrap();
        self.uffd = Some(Arc::new(uffd));
        let file = tempfile::tempfile().unwrap();
        match self.folly {
            Folly::NoUserfaultfd => self.stream.write_all(&header).ok(),
            Folly::AnotherFile => {
                self.stream.send_with_fd(&header[..], file.as_raw_fd()).ok().map(drop)
            }
            _ => self.stream.send_with_fd(&header[..], fd.as_raw_fd()).ok().map(drop),
        }
    }

    fn mem_table(&mut self, payload: &[u8], files: Vec<File>) -> Option<()> {
        // A count and padding, and for each region: guest address, size, user address, offset.
        let mut table = words(payload);
        for (index, file) in files.iter().enumerate() {
            let region = 1 + index * 4;
            let len = table[region + 1];
            let mapping = Mapping::shared(file, len, true).unwrap();
            let base = mapping.address().as_ptr() as u64;
            let mut mappings = self.mappings.lock().unwrap();
            mappings.push(mapping);
            table[region + 2] = match self.folly {
                Folly::Echoes => table[region + 2],
                Folly::Unaligned => base + 2048,
                Folly::Overlaps => mappings[0].address().as_ptr() as u64,
                Folly::PastTheEnd => !0xfff,
                Folly::Unmapped => 0x1000_0000_0000 + region as u64 * (1 << 32),
                _ => base,
            };
        }
        match self.folly {
            Folly::Closes => return None,
            // Until the front-end hangs up.
            Folly::SaysNothing => return Some(()),
            Folly::TooFew => {
                table[0] = 1;
                table.truncate(5);
            }
            Folly::OtherRegions => table[1] += 4096,
            _ => {}
        }
        let payload: Vec<u8> = table.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.reply(SET_MEM_TABLE, &payload)
    }

    fn reply_u64(&mut self, request: u32, value: u64) -> Option<()> {
        self.reply(request, &value.to_ne_bytes())
    }

    fn reply(&mut self, request: u32, payload: &[u8]) -> Option<()> {
        let mut message = [request, 1 | 4, payload.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        self.stream.write_all(&message).ok()
    }
}
