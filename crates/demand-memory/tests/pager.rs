// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pager and vm-memory's view of it, on real shared memory and real images.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, FetchError, Fill, FillRate, MapPresent,
    MemfdBacking, PAGE_SIZE, PageRange, PagerConfig, PagerError, Retrier, RetryPolicy, Stats,
    Waiter,
};
use demand_source::{
    BlockingSource, Destination, Extent, LocalFile, PageSource, SourceError, Threaded,
};
use test_support::image::{Near, far};
use test_support::wait::until;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress,
};

const PAGES: u64 = 1024;
const SIZE: u64 = PAGES * PAGE_SIZE;

/// Returns the value of each byte of a page: p + 1 for page p, and 0 for every fifth, a hole.
fn byte_of(page: u64) -> u8 {
    if page.is_multiple_of(5) { 0 } else { (page + 1) as u8 }
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    for page in (0..PAGES).filter(|page| !page.is_multiple_of(5)) {
        let content = [byte_of(page); PAGE_SIZE as usize];
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &content, page * PAGE_SIZE)
            .unwrap();
    }
    file
}

fn config(source: Arc<dyn PageSource>) -> PagerConfig {
    PagerConfig {
        backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap()),
        source,
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    }
}

fn region(source: impl PageSource + 'static) -> DemandRegion {
    DemandRegion::new(GuestAddress(0x10000), config(Arc::new(source)), ()).unwrap()
}

fn check(region: &DemandRegion, pages: impl Iterator<Item = u64>) {
    let mut content = [0xaa; PAGE_SIZE as usize];
    for page in pages {
        region.read_slice(&mut content, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
        assert!(content.iter().all(|byte| *byte == byte_of(page)), "page {page}");
    }
}

/// A source that fails and delays as a test demands.
struct Fickle {
    image: Arc<LocalFile>,
    failing: Arc<AtomicBool>,
    delay: Duration,
    reads: Arc<AtomicUsize>,
}

impl BlockingSource for Fickle {
    fn size(&self) -> u64 {
        self.image.size()
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.image.extent(offset)
    }
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        thread::sleep(self.delay);
        if self.failing.load(Ordering::Relaxed) {
            // No reader may see bytes that a failed read leaves behind.
            destination.write_at(0, &[0xee; 64]);
            return Err(SourceError::Abandoned);
        }
        self.image.read_through(offset, destination)
    }
}

fn fickle(file: &tempfile::NamedTempFile, delay: Duration) -> Fickle {
    Fickle {
        image: Arc::new(LocalFile::open(file.path()).unwrap()),
        failing: Arc::default(),
        delay,
        reads: Arc::default(),
    }
}

#[test]
fn every_access_sees_the_images_content() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    check(&region, (0..PAGES).rev().step_by(3));
    check(&region, 0..PAGES);
    let stats = region.pager().stats();
    let (vmm, source) = (stats.path(FaultPath::Vmm), stats.source());
    assert_eq!(vmm.pages, PAGES);
    // Holes were not read.
    assert_eq!(source.bytes, (0..PAGES).filter(|page| page % 5 != 0).count() as u64 * PAGE_SIZE);
    assert_eq!(vmm.granularity_bytes, PAGE_SIZE);
}

#[test]
fn accesses_fetch_exactly_the_touched_pages() {
    let file = image();
    let memory = DemandMemory::new(vec![region(LocalFile::open(file.path()).unwrap())]).unwrap();
    let pager = memory.pagers().next().unwrap().clone();
    let missing = || pager.bitmap().count_missing(PageRange::new(0, PAGES));
    let base = 0x10000;

    assert!(memory.check_range(GuestAddress(base), SIZE as usize));
    assert!(!memory.check_range(GuestAddress(base), SIZE as usize + 1));
    assert!(!memory.check_range(GuestAddress(base - 1), 1));
    assert_eq!(missing(), PAGES, "a check fetches nothing");

    let word: u64 = memory.read_obj(GuestAddress(base + 4096 - 4)).unwrap();
    assert_eq!(word, u64::from(u32::from_ne_bytes([byte_of(1); 4])) << 32);
    assert_eq!(missing(), PAGES - 2);
    memory.write_obj(7u8, GuestAddress(base + 9 * 4096)).unwrap();
    assert_eq!(missing(), PAGES - 3);
    memory.store(1u32, GuestAddress(base + 11 * 4096), Ordering::SeqCst).unwrap();
    assert_eq!(memory.load::<u32>(GuestAddress(base + 11 * 4096), Ordering::SeqCst).unwrap(), 1);
    assert_eq!(missing(), PAGES - 4);
    let mut end = [0; 8];
    assert_eq!(memory.read(&mut end, GuestAddress(base + SIZE - 4)).unwrap(), 4);
    assert!(memory.read_slice(&mut end, GuestAddress(base + SIZE - 4)).is_err());

    // Without an armed mapping, no raw pointer is available.
    let region = memory.iter().next().unwrap();
    assert!(matches!(
        region.get_host_address(MemoryRegionAddress(0)),
        Err(GuestMemoryError::HostAddressNotAvailable)
    ));
}

#[test]
fn guest_writes_are_never_overwritten() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    for page in (1..PAGES).step_by(7) {
        region.write_obj(0xd1u8, MemoryRegionAddress(page * PAGE_SIZE + 8)).unwrap();
    }
    // A fetch of a unit and background fill cover the same pages.
    region.pager().fetch(PageRange::new(0, 512), FaultPath::BackEnd).unwrap();
    let fill = Fill::start(vec![region.pager().clone()], FillRate::Unlimited).unwrap();
    while !region.pager().bitmap().is_complete() {
        thread::sleep(Duration::from_millis(1));
    }
    drop(fill);
    for page in 0..PAGES {
        let mut content = [0; PAGE_SIZE as usize];
        region.read_slice(&mut content, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
        let mut expected = [byte_of(page); PAGE_SIZE as usize];
        if page % 7 == 1 {
            expected[8] = 0xd1;
        }
        assert!(content == expected, "page {page}");
    }
}

#[test]
fn many_threads_read_one_slow_source() {
    let file = image();
    let source = fickle(&file, Duration::from_micros(50));
    let reads = source.reads.clone();
    let region = region(Threaded::new(source, 8).unwrap());
    thread::scope(|scope| {
        for seed in 0..8 {
            let region = &region;
            scope.spawn(move || check(region, (0..PAGES).map(|i| (i * 389 + seed * 101) % PAGES)));
        }
    });
    // Each page was read once, whichever thread came first.
    assert_eq!(reads.load(Ordering::Relaxed), (0..PAGES).filter(|page| page % 5 != 0).count());
}

#[test]
fn wait_outlasts_failing_source_and_sees_no_zeros() {
    let file = image();
    for threads in [0, 2] {
        let fickle = fickle(&file, Duration::ZERO);
        let failing = fickle.failing.clone();
        failing.store(true, Ordering::Relaxed);
        let failures = Arc::new(Mutex::new(Vec::new()));
        let seen = failures.clone();
        let policy =
            RetryPolicy { limit: Some(Duration::from_millis(60)), ..RetryPolicy::default() };
        // With threads, the failure arrives later; without, the call itself fails.
        struct AtOnce(Fickle);
        impl PageSource for AtOnce {
            fn size(&self) -> u64 {
                self.0.size()
            }
            fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
                self.0.extent(offset)
            }
            fn submit(&self, _: demand_source::Request) -> demand_source::Completion {
                unreachable!("it answers at once")
            }
            fn read_now(
                &self,
                offset: u64,
                destination: &mut Destination<'_>,
            ) -> Option<Result<(), SourceError>> {
                Some(self.0.read(offset, destination))
            }
        }
        let source: Arc<dyn PageSource> = if threads == 0 {
            Arc::new(AtOnce(fickle))
        } else {
            Arc::new(Threaded::new(fickle, threads).unwrap())
        };
        let mut config = config(source);
        config.retrier = Retrier::new(policy, move |failure| {
            seen.lock().unwrap().push((failure.attempts, failure.given_up));
        });
        let region = DemandRegion::<()>::new(GuestAddress(0), config, ()).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| check(&region, 1..2));
            // Waits for an event, not a time, as the machine may be slow: two reports of giving up.
            let given_up = || failures.lock().unwrap().iter().filter(|(_, given)| *given).count();
            let begun = Instant::now();
            while given_up() < 2 && begun.elapsed() < Duration::from_secs(20) {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(!reader.is_finished(), "the fault stays open");
            assert!(region.pager().bitmap().is_missing(1));
            failing.store(false, Ordering::Relaxed);
            reader.join().unwrap();
        });
        let failures = failures.lock().unwrap();
        assert!(failures.len() >= 3, "{failures:?}");
        assert_eq!(failures[0], (1, false));
        assert!(failures.last().unwrap().1, "given up after the limit: {failures:?}");
        let source = region.pager().stats().source();
        assert_eq!(source.errors, failures.len() as u64);
        assert_eq!(source.retries, source.errors);
    }
}

#[test]
fn slow_source_wait_can_be_kicked_and_stopped() {
    let (source, control) = far(SIZE);
    let region = region(source);
    let (pager, waiter) = (region.pager(), Waiter::new());
    thread::scope(|scope| {
        let _end = control.release_at_the_end();
        control.hold([1]);
        let vcpu = scope.spawn(|| pager.ensure(PageRange::page(1), FaultPath::Guest, &waiter));
        until("the vCPU waits", || waiter.is_waiting());
        waiter.kick();
        assert_eq!(vcpu.join().unwrap(), Err(FetchError::Kicked));
        waiter.clear_kick();
        // The page was requested, and still arrives.
        control.release();
        until("the page arrives", || !pager.bitmap().is_missing(1));
        control.hold([2]);
        let vcpu = scope.spawn(|| pager.ensure(PageRange::page(2), FaultPath::Guest, &waiter));
        until("the vCPU waits", || waiter.is_waiting());
        pager.stop();
        assert_eq!(vcpu.join().unwrap(), Err(FetchError::Stopped));
    });
    let error = region.read_obj::<u8>(MemoryRegionAddress(3 * PAGE_SIZE)).unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error}");
}

#[test]
fn an_image_shorter_than_the_memory_is_refused() {
    let file = image();
    // A part of the last page would do: its rest is zeros.
    file.as_file().set_len(SIZE - PAGE_SIZE).unwrap();
    let config = config(Arc::new(LocalFile::open(file.path()).unwrap()));
    let error = DemandRegion::<()>::new(GuestAddress(0), config, ()).unwrap_err();
    assert!(matches!(error, PagerError::ImageShort { .. }));
    assert!(error.to_string().contains(&SIZE.to_string()), "{error}");
}

#[test]
fn pages_out_of_range_are_refused() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    for range in
        [PageRange::new(PAGES, 1), PageRange::new(u64::MAX, 2), PageRange::new(0, PAGES + 1)]
    {
        let error = region.pager().fetch(range, FaultPath::Guest).unwrap_err();
        assert!(matches!(error, FetchError::OutOfRange { .. }), "{error}");
    }
}

/// A trap that counts the pages it maps, and checks that their bits are not cleared before.
struct Recorder {
    region: std::sync::OnceLock<Arc<demand_memory::Pager>>,
    failures: AtomicUsize,
    mapped: AtomicUsize,
}

impl MapPresent for Recorder {
    fn map_present(&self, pages: PageRange) -> std::io::Result<()> {
        let pager = self.region.get().unwrap();
        for page in pages.first..pages.end() {
            assert!(pager.bitmap().is_missing(page), "mapped before the bit is cleared");
        }
        if self
            .failures
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok()
        {
            return Err(std::io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.mapped.fetch_add(pages.count as usize, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn pages_are_mapped_before_bits_are_cleared() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    let trap = Arc::new(Recorder {
        region: Default::default(),
        failures: AtomicUsize::new(2),
        mapped: AtomicUsize::new(0),
    });
    trap.region.set(region.pager().clone()).unwrap();
    region.pager().set_guest_trap(trap.clone()).unwrap();
    check(&region, 0..PAGES);
    assert_eq!(trap.mapped.load(Ordering::Relaxed) as u64, PAGES);
    assert_eq!(region.pager().stats().source().errors, 2, "a failed mapping is tried again");
}

/// A trap that fails halfway: the guest sees the first page and writes to it, then mapping fails.
struct Halfway {
    guest: demand_memory::Mapping,
    failed: AtomicBool,
}

impl MapPresent for Halfway {
    fn map_present(&self, pages: PageRange) -> std::io::Result<()> {
        if self.failed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: the byte lies in the mapping, and no other thread accesses it.
        unsafe { self.guest.at(pages.offset()).as_ptr().write_volatile(0x55) };
        Err(std::io::Error::from_raw_os_error(libc::ENOMEM))
    }
}

#[test]
fn half_failed_mapping_loses_no_guest_write() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    let guest = region.pager().backing().map().unwrap();
    region
        .pager()
        .set_guest_trap(Arc::new(Halfway { guest, failed: AtomicBool::new(false) }))
        .unwrap();
    region.pager().ensure(PageRange::new(1, 4), FaultPath::Guest, &Waiter::new()).unwrap();
    assert_eq!(region.read_obj::<u8>(MemoryRegionAddress(PAGE_SIZE)).unwrap(), 0x55);
}

#[test]
fn dropped_region_leaves_retrier_to_others() {
    let file = image();
    let retrier = Retrier::new(RetryPolicy::default(), |_| {});
    let make = |failing: bool| {
        let source = fickle(&file, Duration::ZERO);
        let switch = source.failing.clone();
        switch.store(failing, Ordering::Relaxed);
        let mut config = config(Arc::new(Threaded::new(source, 1).unwrap()));
        config.retrier = retrier.clone();
        (DemandRegion::<()>::new(GuestAddress(0), config, ()).unwrap(), switch)
    };
    let (first, _) = make(false);
    let (second, failing) = make(true);
    drop(first);
    second.pager().fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    failing.store(false, Ordering::Relaxed);
    check(&second, 1..2);
}

#[test]
fn completion_is_reported_once() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    region.pager().on_complete(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    check(&region, 0..PAGES - 1);
    assert_eq!(told.load(Ordering::Relaxed), 0);
    check(&region, PAGES - 1..PAGES);
    // The publishing thread calls it, and wakes the reader before.
    until("the end is told", || told.load(Ordering::Relaxed) == 1);
    let count = told.clone();
    region.pager().on_complete(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(told.load(Ordering::Relaxed), 2, "at once if it is complete");
}

/// A panic of the caller's code is not a failure of the page: fetching it again would lose a write.
#[test]
fn panic_of_a_callback_loses_no_write() {
    let region = region(Near(PAGES * PAGE_SIZE));
    let (pager, last) = (region.pager(), PageRange::page(PAGES - 1));
    assert_eq!(pager.fetch(PageRange::new(0, PAGES - 1), FaultPath::Guest), Ok(PAGES - 1));
    let told = Arc::new(AtomicUsize::new(0));
    let count = || {
        let told = told.clone();
        move || _ = told.fetch_add(1, Ordering::Relaxed)
    };
    pager.bitmap().when_present(last, || panic!("of a callback for a page"));
    pager.bitmap().when_present(last, count());
    pager.on_complete(|| panic!("of a callback for the end"));
    pager.on_complete(count());
    pager.fetch(last, FaultPath::Guest).unwrap();
    let address = MemoryRegionAddress(last.offset());
    region.write_obj(0xd1u8, address).unwrap();
    // Longer than the pause before the first retry.
    thread::sleep(Duration::from_millis(100));
    assert_eq!(region.read_obj::<u8>(address).unwrap(), 0xd1);
    assert_eq!(told.load(Ordering::Relaxed), 2);
}

#[test]
fn fill_is_dropped_by_its_last_page() {
    let region = region(Near(PAGES * PAGE_SIZE));
    let slot = Arc::new(Mutex::new(None));
    let (sender, dropped) = std::sync::mpsc::channel();
    region.pager().on_complete({
        let slot = slot.clone();
        move || {
            drop(slot.lock().unwrap().take());
            sender.send(thread::current().name().map(str::to_owned)).unwrap();
        }
    });
    {
        let mut slot = slot.lock().unwrap();
        *slot = Some(Fill::start(vec![region.pager().clone()], FillRate::Unlimited).unwrap());
    }
    let thread = dropped.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(thread.as_deref(), Some("fill"));
}

#[test]
fn completion_of_all_regions_is_reported_once() {
    let file = image();
    let source: Arc<dyn PageSource> = Arc::new(LocalFile::open(file.path()).unwrap());
    let regions = [0x10000, 1 << 32]
        .map(|start| DemandRegion::new(GuestAddress(start), config(source.clone()), ()).unwrap());
    let memory = DemandMemory::new(regions.into()).unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let tell = || {
        let count = told.clone();
        memory.on_complete(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
    };
    tell();
    for (region, told_then) in memory.iter().zip([0, 1]) {
        check(region, 0..PAGES);
        until("the end is told", || told.load(Ordering::Relaxed) == told_then);
    }
    tell();
    assert_eq!(told.load(Ordering::Relaxed), 2, "at once if it is complete");
}

#[test]
fn a_virtqueue_works_on_missing_memory() {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    let file = image();
    let memory = DemandMemory::new(vec![region(LocalFile::open(file.path()).unwrap())]).unwrap();
    let base = 0x10000u64;
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(base as u32), None);
    queue.set_avail_ring_address(Some(base as u32 + 0x5000), None);
    queue.set_used_ring_address(Some(base as u32 + 0xa000), None);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    let descriptor = Descriptor::new(base + 0x20ffe, 4, 0, 0);
    memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(base)).unwrap();
    memory.write_obj(0u16, GuestAddress(base + 0x5004)).unwrap();
    memory.write_obj(1u16, GuestAddress(base + 0x5002)).unwrap();
    let chain = queue.iter(&memory).unwrap().next().unwrap();
    let head = chain.head_index();
    let mut bytes = [0; 4];
    std::io::Read::read_exact(&mut chain.reader(&memory).unwrap(), &mut bytes).unwrap();
    assert_eq!(bytes, [byte_of(32), byte_of(32), byte_of(33), byte_of(33)]);
    queue.add_used(&memory, head, 0).unwrap();
}

#[test]
fn fill_keeps_its_rate() {
    let file = image();
    let region = region(LocalFile::open(file.path()).unwrap());
    let begun = Instant::now();
    // 4 MiB at 16 MiB/s.
    let fill =
        Fill::start(vec![region.pager().clone()], FillRate::BytesPerSecond(16 << 20)).unwrap();
    while !region.pager().bitmap().is_complete() {
        thread::sleep(Duration::from_millis(1));
    }
    drop(fill);
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
}
