// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images of memory that the guest wrote before its pages counted as present.

mod common;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{expect, mapping, read_later, uffd};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, LoadUnit, MapPresent, MappedBytes, Mapping,
    PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier, RetryPolicy, Stats, WriteImageError,
    to_usize,
};
use demand_source::{Destination, HashedImage, ImageWriter, LocalFile, PageSource};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, UnitLoader};
use test_support::host::huge_pages;
use test_support::image::{Near, page_of};
use test_support::wait::{PATIENCE, until};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The word that the guest writes.
const WRITTEN: u64 = 0xd1d1_d1d1;

fn memory(kind: BackingKind, source: impl PageSource + 'static) -> (DemandMemory, Arc<Pager>) {
    let size = source.size();
    let config = PagerConfig {
        backing: common::backing(kind, size),
        source: Arc::new(source),
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    let region = DemandRegion::new(GuestAddress(0), config, ()).unwrap();
    let pager = region.pager().clone();
    (DemandMemory::new(vec![region]).unwrap(), pager)
}

/// Writes a word on a new thread, as a vCPU would; waits if the page is trapped.
fn write_later(mapping: &Arc<Mapping>, offset: u64) -> Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    let mapping = mapping.clone();
    thread::spawn(move || {
        // SAFETY: `at` keeps the word within the mapping, and no reference to it exists.
        unsafe { mapping.at(offset).cast::<u64>().as_ptr().write_volatile(WRITTEN) };
        let _ = sender.send(());
    });
    receiver
}

/// Returns the memory's image, page by page.
fn image(memory: &DemandMemory) -> Result<Vec<Vec<u8>>, WriteImageError> {
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("image"), folder.path().join("table"));
    let size = memory.pagers().map(|pager| pager.pages() * PAGE_SIZE).sum();
    let mut writer = ImageWriter::create(&image, &table, size, [1; 16]).unwrap();
    memory.write_image(&mut writer, &mut |_| true)?;
    writer.finish().unwrap();
    let mut content = vec![0xee; to_usize(size)];
    let image = HashedImage::open(&image, &table).unwrap();
    image.read_through(0, &mut Destination::from(&mut content[..])).unwrap();
    Ok(content.chunks_exact(to_usize(PAGE_SIZE)).map(<[u8]>::to_vec).collect())
}

/// Returns a page of the source after the guest has written its first word.
fn touched(mut page: Vec<u8>) -> Vec<u8> {
    page[..8].copy_from_slice(&WRITTEN.to_ne_bytes());
    page
}

/// A real armed mapping that maps only the first page of each range until `whole` is set.
struct Half {
    armed: Arc<ArmedMapping>,
    whole: AtomicBool,
}

impl MapPresent for Half {
    fn map_present(&self, pages: PageRange) -> io::Result<()> {
        if self.whole.load(Ordering::Relaxed) {
            return self.armed.map_present(pages);
        }
        self.armed.map_present(PageRange::page(pages.first))?;
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }
}

#[test]
fn image_has_writes_to_half_mapped_pages() {
    const PAGES: u64 = 64;
    let (memory, pager) = memory(BackingKind::Shmem, Near(PAGES * PAGE_SIZE));
    let guest = mapping(&pager);
    let armed = ArmedMapping::own(&uffd(), guest.clone(), &pager, FaultPath::Guest).unwrap();
    let trap = Arc::new(Half { armed, whole: AtomicBool::new(false) });
    pager.set_guest_trap(trap.clone()).unwrap();

    let written = write_later(&guest, PAGE_SIZE);
    assert_eq!(pager.fetch(PageRange::new(1, 4), FaultPath::Fill), Ok(0));
    written.recv_timeout(PATIENCE).expect("the first page is mapped");
    assert!(pager.bitmap().is_missing(1), "and does not count as present");

    let check = || {
        for (page, content) in (0..).zip(image(&memory).unwrap()) {
            let source = page_of(page);
            let expected = if page == 1 { touched(source) } else { source };
            assert!(content == expected, "page {page}");
        }
    };
    check();
    trap.whole.store(true, Ordering::Relaxed);
    until("the pages are present", || !pager.bitmap().is_missing(4));
    check();
}

/// A real loader whose loads do not return until the test lets them.
struct Held {
    loader: UnitLoader,
    loaded: Mutex<Sender<()>>,
    go: Mutex<Receiver<()>>,
}

impl LoadUnit for Held {
    fn load(&self, offset: u64, content: MappedBytes<'_>) -> io::Result<()> {
        self.loader.load(offset, content)?;
        let _ = self.loaded.lock().unwrap().send(());
        let _ = self.go.lock().unwrap().recv();
        Ok(())
    }
    fn finish(&self) {
        self.loader.finish();
    }
}

#[test]
fn image_has_writes_to_new_units() {
    const UNIT: u64 = 512;
    let Some(_pool) = huge_pages(1) else { return };
    // Units are created with their content only from a source that cannot block, like a file in
    // memory.
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let content: Vec<u8> = (0..UNIT).flat_map(|_| page_of(1)).collect();
    std::fs::write(file.path(), content).unwrap();
    let (memory, pager) = memory(BackingKind::Hugetlb2M, LocalFile::open(file.path()).unwrap());
    let (loaded, is_loaded) = mpsc::channel();
    let (go, told) = mpsc::channel();
    let loader = UnitLoader::new(&**pager.backing()).unwrap();
    let held = Held { loader, loaded: Mutex::new(loaded), go: Mutex::new(told) };
    pager.set_unit_loader(Arc::new(held));
    // Armed as for KVM's own accesses, which are trapped only until the unit exists.
    let guest = mapping(&pager);
    let own = ArmedMapping::own_missing_units(
        &uffd(),
        guest.clone(),
        &pager,
        FaultPath::HypervisorInternal,
    );
    let armed = own.unwrap();
    pager.set_guest_trap(armed.clone()).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[armed]).unwrap();
    // Dropped before the service, whose thread waits for it.
    let go = go;

    let reader = read_later(&guest, PAGE_SIZE + 8);
    is_loaded.recv_timeout(PATIENCE).expect("the unit is asked for as a whole");
    let written = write_later(&guest, PAGE_SIZE);
    written.recv_timeout(PATIENCE).expect("the unit exists");
    assert!(pager.bitmap().is_missing(1), "and does not count as present");
    let error = image(&memory).map(drop).unwrap_err();
    assert!(matches!(error, WriteImageError::Busy { .. }), "{error}");

    let copying = thread::spawn(move || image(&memory));
    go.send(()).unwrap();
    let image = copying.join().unwrap().unwrap();
    assert!(image[1] == touched(page_of(1)) && image[2] == page_of(1));
    expect(&reader, PAGE_SIZE + 8);
    service.stop();
}

#[test]
fn raw_pointers_wait_for_missing_pages() {
    let (memory, pager) = memory(BackingKind::Shmem, Near(8 * PAGE_SIZE));
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let access = mapping(&pager);
    let armed = ArmedMapping::own(&uffd(), access.clone(), &pager, FaultPath::Vmm).unwrap();
    region.set_access_mapping(access).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[armed]).unwrap();
    let address = region.get_host_address(MemoryRegionAddress(3 * PAGE_SIZE)).unwrap();
    // SAFETY: the word lies in the mapping, which the region keeps, and nothing writes it.
    let word = unsafe { address.cast::<u64>().read_volatile() };
    assert_eq!(word.to_ne_bytes(), page_of(3)[..8]);
}
