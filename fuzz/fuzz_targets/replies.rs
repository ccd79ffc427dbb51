// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the answers of a vhost-user back-end with arbitrary bytes and descriptors. The front-end
//! must process them without a panic, in time, and without leaking a descriptor.
//!
//! The answers are written to the socket before the first request arrives. For each answer the
//! input decides whether it is right, has a changed header or value, consists of other bytes, or
//! ends the connection. With an empty input the back-end does everything right.
#![no_main]

mod input;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, Mapping, MemfdBacking, PageRange,
    PagerConfig, Retrier, RetryPolicy, Stats,
};
use demand_uffd::{FaultService, Features, Userfaultfd};
use demand_vhost::{BackEnd, Options, VhostUserProtocolFeatures, Vring};
use input::Input;
use libfuzzer_sys::fuzz_target;
use test_support::image::Near;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SIZE: u64 = 4 << 20;
const HIGH: u64 = 1 << 32;
/// Start addresses of two regions, so that their bases can overlap.
const STARTS: [u64; 2] = [0, HIGH];
const PATIENCE: Duration = Duration::from_secs(2);

/// The state that all inputs share.
struct World {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    listener: UnixListener,
    service: Arc<FaultService>,
    /// Two guest memories: one with all pages missing, one with all pages present.
    memories: [DemandMemory; 2],
    kick: EventFd,
    /// The lowest free descriptor number when nothing is leaked.
    free: RawFd,
}

fn memory(complete: bool) -> DemandMemory {
    let regions = STARTS.map(|start| {
        let config = PagerConfig {
            backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap()),
            source: Arc::new(Near(SIZE)),
            image_offset: 0,
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        };
        let region = DemandRegion::new(GuestAddress(start), config, ()).unwrap();
        let pages = region.pager().pages();
        if complete {
            region.pager().fetch(PageRange::new(0, pages), FaultPath::Fill).unwrap();
        }
        region
    });
    DemandMemory::new(regions.into()).unwrap()
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let service = Arc::new(FaultService::start(1).unwrap());
        let memories = [memory(false), memory(true)];
        let kick = EventFd::new(0).unwrap();
        let free = File::open("/dev/null").unwrap().as_raw_fd();
        World { _folder: folder, socket, listener, service, memories, kick, free }
    })
}

/// A right answer: the request's number, the payload, and the descriptors.
struct Answer {
    request: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// Returns all right answers, in the order of the requests.
fn right(bases: [u64; 2], uffd: OwnedFd, complete: bool) -> Vec<Answer> {
    let number = |request, value: u64| (request, value.to_ne_bytes().to_vec());
    let config = [0u32, 8, 0].into_iter().flat_map(u32::to_ne_bytes).chain([7; 8]).collect();
    let mut table = vec![STARTS.len() as u64];
    for (start, base) in STARTS.into_iter().zip(bases) {
        table.extend([start, SIZE, base, 0]);
    }
    let table = table.into_iter().flat_map(u64::to_ne_bytes).collect();
    let mut answers = vec![
        number(1, 1 << 32 | 1 << 30),
        number(15, 1 | 1 << 3 | 1 << 8 | 1 << 9),
        number(17, 1),
        // SET_FEATURES.
        number(2, 0),
        (24, config),
        (28, vec![]),
        number(29, 0),
        (5, table),
        number(1, 1 << 32 | 1 << 30),
        // The queue's size, addresses, index, call, kick, enable.
        number(8, 0),
        number(9, 0),
        number(10, 0),
        number(13, 0),
        number(12, 0),
        number(18, 0),
        // GET_VRING_BASE, which stops the queue.
        number(11, 0),
    ];
    if complete {
        answers.push(number(30, 0));
    }
    let mut answers: Vec<_> = answers
        .into_iter()
        .map(|(request, payload)| Answer { request, payload, fds: vec![] })
        .collect();
    answers[5].fds.push(uffd);
    answers
}

/// Returns an arbitrary descriptor.
fn some_fd(kind: u8) -> OwnedFd {
    match kind % 6 {
        0 => File::open("/dev/null").unwrap().into(),
        1 => std::io::pipe().unwrap().0.into(),
        2 => UnixStream::pair().unwrap().0.into(),
        3 => tempfile::tempfile().unwrap().into(),
        4 => Userfaultfd::open(Features::NONE).unwrap().try_clone_fd().unwrap(),
        _ => world()
            .kick
            .try_clone()
            .map(|event| {
                let file: File = {
                    use std::os::fd::{FromRawFd, IntoRawFd};
                    // SAFETY: `into_raw_fd` has just passed on ownership of the descriptor.
                    unsafe { File::from_raw_fd(event.into_raw_fd()) }
                };
                file.into()
            })
            .unwrap(),
    }
}

/// Writes the answers to the socket and shuts down the sending side.
fn answer(mut stream: &UnixStream, answers: Vec<Answer>, input: &mut Input<'_>) {
    for Answer { request, mut payload, mut fds } in answers {
        let how = input.byte();
        let mut header = [request, 1 | 4, payload.len() as u32];
        match how % 8 {
            // A changed value, at any offset.
            1 | 2 if !payload.is_empty() => {
                let at = input.below(payload.len() as u64) as usize & !7;
                let value = input.bytes::<8>();
                let count = value.len().min(payload.len() - at);
                payload[at..at + count].copy_from_slice(&value[..count]);
            }
            3 => header[usize::from(input.byte() % 3)] = input.word() as u32,
            4 => {
                payload = input.slice(usize::from(how)).to_vec();
                header[2] = payload.len() as u32;
            }
            5 => {
                let count = usize::from(input.byte() % 40);
                fds = (0..count.min(33)).map(|_| some_fd(input.byte())).collect();
            }
            6 => {
                let len = usize::from(how) * 4;
                let _ = stream.write_all(input.slice(len));
                continue;
            }
            7 if how >= 128 => {
                let len = usize::from(input.byte()) % (12 + payload.len());
                let message = [&header.map(u32::to_ne_bytes).concat(), &payload[..]].concat();
                let _ = stream.write_all(&message[..len]);
                break;
            }
            _ => {}
        }
        let message = [&header.map(u32::to_ne_bytes).concat(), &payload[..]].concat();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        // The kernel duplicates the descriptors; ours are closed at the end.
        let sent = if raw.is_empty() {
            stream.write_all(&message).is_ok()
        } else {
            stream.send_with_fds(&[&message[..]], &raw).is_ok()
        };
        if !sent {
            // The front-end has closed the connection.
            return;
        }
    }
    let _ = stream.write_all(input.rest());
    // The requests are never read: the socket buffer has room for all of them.
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

/// Performs all operations of a VMM on a back-end, up to the first error.
fn use_back_end(mut back_end: BackEnd, memory: &DemandMemory) -> demand_vhost::Result<()> {
    let world = world();
    back_end.set_features(back_end.features())?;
    let mut config = [0; 8];
    back_end.read_config(0, &mut config)?;
    back_end.share_missing_memory(memory, &world.service)?;
    let vring = Vring {
        size: 16,
        descriptors: GuestAddress(0x1000),
        available: GuestAddress(HIGH),
        used: GuestAddress(HIGH + 0x800),
        next_available: 0,
        kick: &world.kick,
        call: &world.kick,
    };
    back_end.set_vring(0, &vring, true)?;
    let _ = back_end.check();
    back_end.stop_vring(0)?;
    back_end.end_postcopy()
}

fuzz_target!(|bytes: &[u8]| {
    let world = world();
    let mut input = Input::new(bytes);
    let complete = input.byte() & 1 == 1;
    let memory = &world.memories[usize::from(complete)];
    let mappings: Vec<Mapping> =
        memory.pagers().map(|pager| pager.backing().map().unwrap()).collect();
    let bases = [0, 1].map(|index: usize| mappings[index].address().as_ptr() as u64);
    let uffd = Userfaultfd::open(Features::GUEST_MEMORY).unwrap();
    let answers = right(bases, uffd.try_clone_fd().unwrap(), complete);
    let begun = Instant::now();
    // Another thread accepts the connection and answers.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (stream, _) = world.listener.accept().unwrap();
            answer(&stream, answers, &mut input);
            // Keeps the connection open for requests until the front-end closes it.
            let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
            // SAFETY: the pointer and the count describe one valid entry.
            unsafe { libc::poll(&mut poll, 1, 60_000) };
        });
        let options =
            Options::default().needed(VhostUserProtocolFeatures::CONFIG).patience(PATIENCE);
        let outcome = BackEnd::connect(&world.socket, options)
            .and_then(|back_end| use_back_end(back_end, memory));
        if let Err(error) = outcome {
            let text = error.to_string();
            assert!(!text.contains('\n') && text.len() < 1000, "{text}");
            assert!(bytes.len() > 1 || !complete, "right answers are refused: {text}");
        }
    });
    assert!(begun.elapsed() < PATIENCE + Duration::from_secs(2), "it takes {:?}", begun.elapsed());
    drop((uffd, mappings));
    let free = File::open("/dev/null").unwrap().as_raw_fd();
    // The fuzzer itself may keep one or two descriptors, so a few more are allowed.
    assert!(free <= world.free + 4, "descriptors are kept: {free} after {}", world.free);
});
