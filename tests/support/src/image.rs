// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image in which every word identifies its place, and sources that serve it.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use demand_memory::PAGE_SIZE;
use demand_source::{
    BlockingSource, Completion, Destination, Extent, PageSource, Request, SourceError, Threaded,
};

/// Returns whether the image has a hole there: every fifth page is one.
pub fn is_hole(page: u64) -> bool {
    page.is_multiple_of(5)
}

/// Returns the word at `offset` (bytes, a multiple of 8) of the image.
pub fn word_of(offset: u64) -> u64 {
    if is_hole(offset / PAGE_SIZE) { 0 } else { offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
}

/// Returns the content of a page of the image.
pub fn page_of(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|i| word_of(page * PAGE_SIZE + i * 8).to_ne_bytes()).collect()
}

fn write(offset: u64, destination: &mut Destination<'_>) {
    for at in (0..destination.len() as u64).step_by(PAGE_SIZE as usize) {
        destination.write_at(at as usize, &page_of((offset + at) / PAGE_SIZE));
    }
}

fn extent(offset: u64, size: u64) -> Extent {
    let page = offset / PAGE_SIZE;
    if is_hole(page) {
        Extent::Hole { end: (page + 1) * PAGE_SIZE }
    } else {
        Extent::Data { end: size.min((page / 5 + 1) * 5 * PAGE_SIZE) }
    }
}

/// A source with this many bytes that answers at once.
#[derive(Debug)]
pub struct Near(pub u64);

impl PageSource for Near {
    fn size(&self) -> u64 {
        self.0
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        Ok(extent(offset, self.0))
    }
    fn submit(&self, mut request: Request) -> Completion {
        for chunk in &mut request.chunks {
            write(chunk.offset, &mut chunk.destination);
        }
        drop(request);
        Completion::ready(Ok(()))
    }
    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        write(offset, destination);
        Some(Ok(()))
    }
}

/// A source of this many bytes that cannot be read.
#[derive(Debug)]
pub struct Broken(pub u64);

impl PageSource for Broken {
    fn size(&self) -> u64 {
        self.0
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Err(SourceError::Abandoned)
    }
    fn submit(&self, _: Request) -> Completion {
        Completion::ready(Err(SourceError::Abandoned))
    }
}

/// Controls a [`Far`] source for a test.
#[derive(Debug, Default)]
pub struct Control {
    /// Pages that are held back.
    held: Mutex<HashSet<u64>>,
    changed: Condvar,
    /// Pages that cannot be read.
    failing: Mutex<HashSet<u64>>,
}

impl Control {
    /// Also holds back these pages of the image.
    pub fn hold(&self, pages: impl IntoIterator<Item = u64>) {
        self.held.lock().unwrap().extend(pages);
    }
    /// Releases all pages.
    pub fn release(&self) {
        self.held.lock().unwrap().clear();
        self.changed.notify_all();
    }
    /// Returns a guard that releases all pages when it is dropped, so that a failing test can end.
    pub fn release_at_the_end(self: &Arc<Self>) -> impl Drop {
        struct Guard(Arc<Control>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.release();
            }
        }
        Guard(self.clone())
    }
    /// Also fails reads of these pages.
    pub fn fail(&self, pages: impl IntoIterator<Item = u64>) {
        self.failing.lock().unwrap().extend(pages);
    }
    /// Stops failing reads.
    pub fn recover(&self) {
        self.failing.lock().unwrap().clear();
    }
}

/// A blocking source that a test controls.
#[derive(Debug)]
pub struct Far {
    size: u64,
    control: Arc<Control>,
}

impl BlockingSource for Far {
    fn size(&self) -> u64 {
        self.size
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        Ok(extent(offset, self.size))
    }
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        let pages = offset / PAGE_SIZE..(offset + destination.len() as u64).div_ceil(PAGE_SIZE);
        let mut held = self.control.held.lock().unwrap();
        while pages.clone().any(|page| held.contains(&page)) {
            held = self.control.changed.wait(held).unwrap();
        }
        drop(held);
        let failing = self.control.failing.lock().unwrap();
        if pages.clone().any(|page| failing.contains(&page)) {
            let source = io::Error::from_raw_os_error(5);
            let image = "image".into();
            let len = destination.len() as u64;
            return Err(SourceError::Read { image, offset, len, source });
        }
        drop(failing);
        write(offset, destination);
        Ok(())
    }
}

/// Creates a [`Far`] source of `size` bytes, and its control.
pub fn far(size: u64) -> (Threaded<Far>, Arc<Control>) {
    let control = Arc::new(Control::default());
    (Threaded::new(Far { size, control: control.clone() }, 8).unwrap(), control)
}
