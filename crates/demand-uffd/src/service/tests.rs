// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The threads of a service: how many a message wakes, and that none of its faults is forgotten or
//! waits for another.

use std::sync::mpsc::{self, Receiver};

use demand_memory::{
    BackingKind, FaultPath, Mapping, MemfdBacking, PAGE_SIZE, Pager, PagerConfig, Retrier,
    RetryPolicy, to_usize,
};
use demand_source::PageSource;
use test_support::image::{Broken, Near, word_of};
use test_support::wait::PATIENCE;

use super::*;
use crate::Features;

const PAGES: u64 = 1024;
/// None, and one that is long enough for a busy host.
const SPINS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(5)];

/// Starts a service whose threads spin even if the host is busy.
fn start(threads: usize, spin: Duration) -> FaultService {
    let processors = (!spin.is_zero()).then(Processors::idle);
    FaultService::start_on(processors, ServiceOptions { threads, spin }).unwrap()
}

/// A mapping of new memory, and what serves its faults.
struct Memory {
    mapping: Arc<Mapping>,
    armed: Arc<ArmedMapping>,
    pager: Arc<Pager>,
}

impl Memory {
    fn new(
        uffd: &Arc<Userfaultfd>,
        source: impl PageSource + 'static,
        observer: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let backing = MemfdBacking::new(BackingKind::Shmem, source.size()).unwrap();
        let retrier = Retrier::new(RetryPolicy::default(), move |_| observer());
        let config = PagerConfig::new(Arc::new(backing), Arc::new(source));
        let pager = Pager::new(PagerConfig { retrier, ..config }).unwrap();
        let mapping = Arc::new(pager.backing().map().unwrap());
        let armed = ArmedMapping::own(uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
        Memory { mapping, armed, pager }
    }

    fn near(uffd: &Arc<Userfaultfd>) -> Self {
        Memory::new(uffd, Near(PAGES * PAGE_SIZE), || panic!("the source answers"))
    }
}

fn uffd() -> Arc<Userfaultfd> {
    Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap())
}

/// Reads the first words of pages on a new thread, so that a lost fault fails the test instead of
/// blocking it. The memories stay mapped.
fn read(pages: Vec<(Arc<Mapping>, u64)>) -> Receiver<Vec<u64>> {
    let (sender, words) = mpsc::channel();
    thread::spawn(move || {
        let word = |(mapping, page): &(Arc<Mapping>, u64)| {
            let at = mapping.at(page * PAGE_SIZE).cast::<u64>();
            // SAFETY: the word lies in the mapping, which this thread keeps, and no thread writes
            // to it.
            unsafe { at.as_ptr().read_volatile() }
        };
        let _ = sender.send(pages.iter().map(word).collect());
    });
    words
}

fn pages(memory: &Memory, pages: impl Iterator<Item = u64>) -> Vec<(Arc<Mapping>, u64)> {
    pages.map(|page| (memory.mapping.clone(), page)).collect()
}

fn expect(words: &Receiver<Vec<u64>>, pages: impl Iterator<Item = u64>) {
    let words = words.recv_timeout(PATIENCE).expect("all faults are served");
    assert_eq!(words, pages.map(|page| word_of(page * PAGE_SIZE)).collect::<Vec<_>>());
}

#[test]
fn each_message_wakes_one_thread() {
    for spin in SPINS {
        let (uffd, service) = (uffd(), start(4, spin));
        let memory = Memory::near(&uffd);
        service.add(std::slice::from_ref(&memory.armed)).unwrap();
        expect(&read(pages(&memory, 0..PAGES)), 0..PAGES);
        let counts = service.counts();
        assert!(counts.messages >= PAGES, "{counts:?}");
        // Some, because a thread may be woken while another one reads its message.
        assert!(counts.wake_ups <= counts.messages + PAGES / 16, "{counts:?}");
        assert!(spin.is_zero() || counts.spun > 0, "{counts:?}");
        println!("{spin:?}: {counts:?}");
    }
}

#[test]
fn no_message_is_lost_among_threads() {
    /// More than one read takes.
    const FAULTERS: u64 = 40;
    for (threads, spin) in (1..=4).flat_map(|threads| SPINS.map(|spin| (threads, spin))) {
        for late in [false, true] {
            let (uffd, service) = (uffd(), start(threads, spin));
            let memory = Memory::near(&uffd);
            if !late {
                service.add(std::slice::from_ref(&memory.armed)).unwrap();
            }
            let of = |faulter| (faulter..PAGES).step_by(to_usize(FAULTERS));
            let readers: Vec<_> =
                (0..FAULTERS).map(|faulter| read(pages(&memory, of(faulter)))).collect();
            if late {
                // All of them wait by now, but the kernel tells so only once.
                thread::sleep(Duration::from_millis(30));
                service.add(std::slice::from_ref(&memory.armed)).unwrap();
            }
            for (faulter, reader) in (0..).zip(&readers) {
                expect(reader, of(faulter));
            }
        }
    }
}

/// While one thread is stuck in serving a message, the others serve the same userfaultfd.
#[test]
fn stuck_thread_delays_no_other() {
    for spin in SPINS.into_iter().flat_map(|spin| [spin; 10]) {
        let (uffd, service) = (uffd(), start(2, spin));
        let (told, tell) = mpsc::channel();
        let (free, busy) = mpsc::channel::<()>();
        let (told, busy) = (Mutex::new(told), Mutex::new(busy));
        let broken = Memory::new(&uffd, Broken(PAGE_SIZE), move || {
            let _ = told.lock().unwrap().send(());
            // It ends with the sender.
            let _ = busy.lock().unwrap().recv();
        });
        let memory = Memory::near(&uffd);
        service.add(&[memory.armed.clone(), broken.armed.clone()]).unwrap();
        // A thread that has served some faults spins a while, and then gets stuck.
        expect(&read(pages(&memory, 0..100)), 0..100);
        thread::sleep(Duration::from_micros(500));
        let _blocked = read(pages(&broken, 0..1));
        tell.recv_timeout(PATIENCE).expect("a thread is stuck");
        expect(&read(pages(&memory, 100..PAGES)), 100..PAGES);
        drop(free);
        broken.pager.stop();
        memory.pager.stop();
    }
}
