// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, and the sources that serve them.

use super::*;

/// Guest physical address of the demand-paged region.
pub const REGION: u64 = 0x4000_0000;

/// Constant that the words of an image are combined with.
pub const MIX: u32 = 0x5bd1_e995;

/// Returns the image's word at `offset`, which encodes its guest address.
pub fn word(offset: u64) -> u32 {
    (REGION + offset) as u32 ^ MIX
}

/// Returns a page of an image without holes.
pub fn full_page(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE).step_by(4).flat_map(|at| word(page * PAGE_SIZE + at).to_le_bytes()).collect()
}

/// Returns whether a page of an image file is a hole: every seventh is.
pub fn is_hole(page: u64) -> bool {
    page % 7 == 3
}

/// Returns a page of an image file.
pub fn page(page: u64) -> Vec<u8> {
    if is_hole(page) { vec![0; PAGE_SIZE as usize] } else { full_page(page) }
}

/// Creates an image file in memory, so that a source reads it on the faulting thread on any host.
pub fn image_file(pages: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(pages * PAGE_SIZE).unwrap();
    for index in (0..pages).filter(|index| !is_hole(*index)) {
        file.as_file().write_all_at(&full_page(index), index * PAGE_SIZE).unwrap();
    }
    file
}

pub fn pager(kind: BackingKind, pages: u64, source: Arc<dyn PageSource>) -> Arc<Pager> {
    let backing = MemfdBacking::new(kind, pages * PAGE_SIZE).unwrap();
    let retrier = Retrier::new(RetryPolicy::default(), |failure| panic!("{}", failure.error));
    Pager::new(PagerConfig { retrier, ..PagerConfig::new(Arc::new(backing), source) }).unwrap()
}

/// Creates a pager over an image file.
pub fn file_pager(kind: BackingKind, pages: u64) -> Arc<Pager> {
    // The open file outlives its name.
    let file = image_file(pages);
    pager(kind, pages, Arc::new(LocalFile::open(file.path()).unwrap()))
}

/// A source that writes a page slowly, in pieces: a reader that comes too early sees them.
pub struct Torn(pub u64);

impl PageSource for Torn {
    fn size(&self) -> u64 {
        self.0 * PAGE_SIZE
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size() })
    }

    fn submit(&self, request: Request) -> Completion {
        for mut chunk in request.chunks {
            self.read_now(chunk.offset, &mut chunk.destination);
        }
        Completion::ready(Ok(()))
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        const PIECE: usize = 1024;
        for at in (0..destination.len()).step_by(PIECE).rev() {
            let at_image = offset + at as u64;
            let within = (at_image % PAGE_SIZE) as usize;
            destination.write_at(at, &full_page(at_image / PAGE_SIZE)[within..within + PIECE]);
            thread::yield_now();
        }
        Some(Ok(()))
    }
}

/// A source that answers only once it is opened.
#[derive(Clone)]
pub struct Gate {
    pub pages: u64,
    open: Arc<(Mutex<bool>, Condvar)>,
}

impl Gate {
    pub fn new(pages: u64) -> Self {
        Gate { pages, open: Arc::default() }
    }

    pub fn open(&self) {
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }

    /// Holds back all pages from now on.
    pub fn shut(&self) {
        *self.open.0.lock().unwrap() = false;
    }
}

impl BlockingSource for Gate {
    fn size(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: BlockingSource::size(self) })
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        let open = self.open.0.lock().unwrap();
        drop(self.open.1.wait_while(open, |open| !*open).unwrap());
        Torn(self.pages).read_now(offset, destination).expect("Torn answers at once")
    }
}

/// Copies bytes out of a mapping, even while other threads or a guest write them.
pub fn look(mapping: &Mapping, offset: u64, len: u64) -> Vec<u8> {
    assert!(offset + len <= mapping.len());
    let mut bytes = vec![0u8; len as usize];
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the byte lies in the mapping. The guest and pagers may write it concurrently, but
        // through no Rust reference, and the read is volatile.
        *byte = unsafe { mapping.at(offset + index as u64).as_ptr().read_volatile() };
    }
    bytes
}

/// Makes a mapping inaccessible to all of its users, KVM included.
pub fn close(mapping: &Mapping) {
    let (address, len) = (mapping.address().as_ptr().cast(), mapping.len() as usize);
    // SAFETY: the range belongs to the mapping, and this process does not read it any more.
    assert_eq!(unsafe { libc::mprotect(address, len, libc::PROT_NONE) }, 0);
}

/// Reads a word of a mapping, even while other threads or a guest write it.
pub fn look_at_word(mapping: &Mapping, offset: u64) -> u32 {
    assert!(offset + 4 <= mapping.len() && offset.is_multiple_of(4));
    // SAFETY: as above; mappings begin on a page boundary, so the word is aligned.
    unsafe { mapping.at(offset).cast::<u32>().as_ptr().read_volatile() }
}
