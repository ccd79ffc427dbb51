// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the handling of userfaultfds: arbitrary messages, arbitrary descriptors, and a real
//! userfaultfd whose faults are served while pages are held back, fail, are dropped from the page
//! tables, or become present in other ways. Every fault must end, with the right bytes.
#![no_main]

mod input;

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, Mapping, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig,
    Retrier, RetryPolicy, Stats,
};
use demand_source::PageSource;
use demand_uffd::{ArmedMapping, Event, FaultService, Features, Modes, Userfaultfd};
use input::Input;
use libfuzzer_sys::fuzz_target;
use test_support::image::{self, Control, word_of};

/// Size of a message in bytes, by the kernel's ABI.
const MESSAGE: usize = 32;
/// One chunk of a back-end fault (512 pages), and some more.
const PAGES: u64 = 512 + 12;
const SIZE: u64 = PAGES * PAGE_SIZE;
/// Time limit for everything that must end.
const PATIENCE: Duration = Duration::from_secs(8);

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.byte() % 4 {
        0 => messages(&mut input),
        1 => descriptors(&mut input),
        _ => faults(&mut input),
    }
});

/// Reads arbitrary bytes as messages of a userfaultfd.
fn messages(input: &mut Input<'_>) {
    let (reader, mut writer) = UnixStream::pair().unwrap();
    reader.set_nonblocking(true).unwrap();
    // The kernel guarantees that the descriptor in a fork message belongs to the reader. A fuzzer
    // cannot, so a real descriptor is put in here.
    const FORK: u8 = 0x13;
    let mut sent = Vec::new();
    for message in input.rest().chunks(MESSAGE).take(100) {
        let mut message = message.to_vec();
        if message[0] == FORK {
            if message.len() < MESSAGE {
                break;
            }
            let fd = File::open("/dev/null").unwrap();
            message[8..12].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
            // The reader of the message takes ownership.
            std::mem::forget(fd);
        }
        writer.write_all(&message).unwrap();
        sent.push(message);
    }
    drop(writer);
    // SAFETY: the descriptors in fork messages were opened above, and the reader alone owns them.
    let uffd = unsafe { Userfaultfd::from_own(OwnedFd::from(reader)) };
    let mut events = Vec::new();
    while uffd.read(&mut events).is_ok_and(|count| count > 0) {}
    let whole = sent.iter().filter(|message| message.len() == MESSAGE).count();
    assert_eq!(events.len(), whole);
    for (message, event) in sent.iter().zip(&events) {
        let word = |index: usize| {
            u64::from_ne_bytes(message[8 + index * 8..16 + index * 8].try_into().unwrap())
        };
        let right = match *event {
            Event::Pagefault { address, write, minor, write_protected } => {
                let flags = [write, write_protected, minor].map(u64::from);
                let flags = flags[0] | flags[1] << 1 | flags[2] << 2;
                message[0] == 0x12 && flags == word(0) & 7 && address == word(1)
            }
            Event::Fork(ref fd) => message[0] == FORK && fd.as_raw_fd() == word(0) as i32,
            Event::Remap { from, to, len } => {
                message[0] == 0x14 && [from, to, len] == [word(0), word(1), word(2)]
            }
            Event::Remove { start, end } => {
                message[0] == 0x15 && [start, end] == [word(0), word(1)]
            }
            Event::Unmap { start, end } => message[0] == 0x16 && [start, end] == [word(0), word(1)],
            Event::Unknown(event) => message[0] == event && !(0x12..=0x16).contains(&event),
            _ => false,
        };
        assert!(right, "{message:?} was read as {event:?}");
    }
}

/// Passes arbitrary descriptors as a back-end's userfaultfd: only a userfaultfd that is ready for
/// use is accepted.
fn descriptors(input: &mut Input<'_>) {
    let kind = input.byte() % 8;
    let fd: OwnedFd = match kind {
        0 => File::open("/dev/null").unwrap().into(),
        1 => std::io::pipe().unwrap().0.into(),
        2 => std::io::pipe().unwrap().1.into(),
        3 => UnixStream::pair().unwrap().0.into(),
        4 => tempfile::tempfile().unwrap().into(),
        5 => File::open("/proc/self").unwrap().into(),
        6 => {
            let uffd = Userfaultfd::open(Features::from_bits(input.word() & 0x1ff0)).ok();
            match uffd {
                Some(uffd) => uffd.try_clone_fd().unwrap(),
                None => return,
            }
        }
        _ => Userfaultfd::open(Features::GUEST_MEMORY).unwrap().try_clone_fd().unwrap(),
    };
    // SAFETY: fcntl with this command accesses no memory.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, (input.word() & 0xffff) as libc::c_int) };
    let taken = Userfaultfd::from_received(fd);
    assert_eq!(taken.is_ok(), kind >= 6, "{taken:?}");
    if let Ok(uffd) = taken {
        assert_eq!(uffd.read(&mut Vec::new()).unwrap(), 0);
    }
}

/// A thread that touches memory, and blocks on missing pages.
struct Toucher {
    addresses: SyncSender<u64>,
    words: Receiver<u64>,
    /// The expected value of the word that the thread is reading.
    expected: Option<u64>,
}

impl Toucher {
    fn new() -> Self {
        let (addresses, asked) = sync_channel::<u64>(1);
        let (answers, words) = sync_channel(1);
        std::thread::spawn(move || {
            for address in asked {
                // SAFETY: the word lies in a mapping that lives until this thread has answered, and
                // no reference to it exists.
                let word = unsafe { (address as *const u64).read_volatile() };
                answers.send(word).unwrap();
            }
        });
        Toucher { addresses, words, expected: None }
    }

    fn touch(&mut self, address: u64, expected: u64) {
        self.addresses.send(address).unwrap();
        self.expected = Some(expected);
    }

    /// Waits for the thread's word for at most `patience` and compares it. Returns whether the
    /// thread is idle.
    fn look(&mut self, patience: Duration) -> bool {
        let Some(expected) = self.expected else { return true };
        let Ok(word) = self.words.recv_timeout(patience) else { return false };
        assert_eq!(word, expected);
        self.expected = None;
        true
    }
}

struct World {
    service: FaultService,
    source: Arc<dyn PageSource>,
    control: Arc<Control>,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let (source, control) = image::far(SIZE);
        World { service: FaultService::start(2).unwrap(), source: Arc::new(source), control }
    })
}

thread_local! {
    static TOUCHERS: RefCell<Vec<Toucher>> =
        RefCell::new((0..4).map(|_| Toucher::new()).collect());
}

/// Touches a mapping whose faults are served, while the input changes the conditions.
fn faults(input: &mut Input<'_>) {
    let world = world();
    let shape = input.byte();
    let policy = RetryPolicy {
        first: Duration::from_millis(1),
        longest: Duration::from_millis(2),
        limit: None,
    };
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap());
    let (stats, retrier) = (Arc::new(Stats::new()), Retrier::new(policy, |_| {}));
    let pager = Pager::new(PagerConfig {
        stats: stats.clone(),
        retrier,
        ..PagerConfig::new(backing, world.source.clone())
    })
    .unwrap();
    let mapping = Arc::new(pager.backing().map().unwrap());
    let mut features = Features::GUEST_MEMORY;
    for (bit, feature) in
        [Features::EVENT_REMOVE, Features::EVENT_UNMAP, Features::EXACT_ADDRESS].iter().enumerate()
    {
        if shape >> bit & 1 == 1 {
            features = features | *feature;
        }
    }
    let uffd = Arc::new(Userfaultfd::open(features).unwrap());
    let armed = if shape & 8 == 0 {
        ArmedMapping::foreign(&uffd, mapping.address().as_ptr() as u64, &pager).unwrap()
    } else {
        let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
        pager.set_guest_trap(armed.clone()).unwrap();
        armed
    };
    world.service.add(std::slice::from_ref(&armed)).unwrap();
    let outside = Mapping::anonymous(16 * PAGE_SIZE).unwrap();
    let outside_at = |page| outside.at(page * PAGE_SIZE).as_ptr() as u64;
    uffd.register(outside_at(0), outside.len(), Modes::MISSING).unwrap();

    TOUCHERS.with_borrow_mut(|touchers| {
        for _ in 0..48 {
            if input.is_empty() {
                break;
            }
            let (what, page) = (input.byte(), input.below(PAGES));
            let offset = page * PAGE_SIZE;
            for toucher in touchers.iter_mut() {
                toucher.look(Duration::ZERO);
            }
            let idle = touchers.iter_mut().find(|toucher| toucher.expected.is_none());
            match what % 12 {
                0..=2 => {
                    let offset = offset + u64::from(what >> 4) * 8;
                    if let Some(toucher) = idle {
                        toucher.touch(mapping.at(offset).as_ptr() as u64, word_of(offset));
                    }
                }
                3 => {
                    let range = PageRange::new(page, (u64::from(what) * 3).min(PAGES - page));
                    pager.fetch(range, FaultPath::Guest).unwrap();
                }
                4 => world.control.hold([page, page ^ 1]),
                5 => world.control.release(),
                6 => world.control.fail([page, page ^ 3]),
                7 => world.control.recover(),
                8 => {
                    let at = mapping.at(offset).as_ptr();
                    let len = usize::from(what).min((PAGES - page) as usize) * 4096;
                    // SAFETY: the pages are shared memory, so the memory object keeps their bytes.
                    unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
                }
                9 => {
                    if let Some(toucher) = idle {
                        toucher.touch(outside_at(page % 16), 0);
                    }
                }
                10 => uffd.wake(armed.base(), armed.len()).unwrap(),
                _ => {
                    if what & 128 != 0 {
                        world.service.forget(&uffd);
                    }
                    world.service.add(std::slice::from_ref(&armed)).unwrap();
                }
            }
        }
        // Ends all failures and holds, so that every thread continues.
        world.control.release();
        world.control.recover();
        uffd.unregister(outside_at(0), outside.len()).unwrap();
        for toucher in touchers.iter_mut() {
            assert!(toucher.look(PATIENCE), "a fault is not served");
        }
    });
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    let begun = Instant::now();
    while !pager.bitmap().is_complete() {
        assert!(begun.elapsed() < PATIENCE, "pages never arrive");
        std::thread::sleep(Duration::from_micros(100));
    }
    // A page that was claimed stays claimed, so each page is populated exactly once.
    while stats.pages_arrived() != PAGES {
        assert!(begun.elapsed() < PATIENCE, "{} arrived", stats.pages_arrived());
    }
    world.service.release(&uffd).unwrap();
    uffd.close();
    for page in (0..PAGES).step_by(7) {
        // SAFETY: the word lies in the mapping, where nothing is trapped any more and no reference
        // exists.
        let word = unsafe { mapping.at(page * PAGE_SIZE).cast::<u64>().as_ptr().read_volatile() };
        assert_eq!(word, word_of(page * PAGE_SIZE), "page {page}");
    }
}
