// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source of the measured pages, and the order in which the guest touches them.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use demand_memory::PAGE_SIZE;
use demand_source::{Completion, Destination, Extent, LocalFile, PageSource, Request, SourceError};
use test_guest::plan::Order;

use crate::error::Error;

/// Number of pages in the hot buffer: few enough for a cache, and prime, so that pages at the same
/// offset in two units differ.
const HOT_PAGES: u64 = 61;

/// Distance between touches in strided order, in pages: one unit of 2 MiB.
const STRIDE: usize = 512;

/// The option `--source hot|FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOption {
    /// A small buffer in memory, used repeatedly, so that the cost of the fault dominates.
    Hot,
    /// A raw image.
    File(PathBuf),
}

impl FromStr for SourceOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("--source: the value is empty; use hot, or name an image".into()),
            "hot" => Ok(SourceOption::Hot),
            path => Ok(SourceOption::File(path.into())),
        }
    }
}

impl SourceOption {
    /// Returns the source's name in reports.
    pub fn name(&self) -> String {
        match self {
            SourceOption::Hot => "hot".into(),
            SourceOption::File(path) => path.display().to_string(),
        }
    }

    /// Opens the source with a size of `size` bytes.
    ///
    /// # Errors
    ///
    /// If the image cannot be opened.
    pub fn open(&self, size: u64) -> Result<Arc<dyn PageSource>, Error> {
        Ok(match self {
            SourceOption::Hot => Arc::new(HotBuffer::new(size)),
            SourceOption::File(path) => Arc::new(LocalFile::open(path).map_err(Error::failed)?),
        })
    }
}

/// A source that copies from a buffer that stays in the processor's cache.
struct HotBuffer {
    size: u64,
    bytes: Box<[u8]>,
}

impl HotBuffer {
    fn new(size: u64) -> Self {
        let words = 1..=HOT_PAGES * PAGE_SIZE / 8;
        let bytes = words.flat_map(|word| scatter(word).to_le_bytes()).collect();
        HotBuffer { size, bytes }
    }
}

impl PageSource for HotBuffer {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size })
    }

    fn submit(&self, mut request: Request) -> Completion {
        for chunk in &mut request.chunks {
            let _ = self.read_now(chunk.offset, &mut chunk.destination);
        }
        Completion::ready(Ok(()))
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let mut at = 0;
        while at < destination.len() {
            let from = ((offset + at as u64) % self.bytes.len() as u64) as usize;
            let len = (self.bytes.len() - from).min(destination.len() - at);
            destination.write_at(at, &self.bytes[from..from + len]);
            at += len;
        }
        Some(Ok(()))
    }
}

/// Returns a pseudo-random number: the 64-bit finalizer of MurmurHash3.
fn scatter(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

/// Returns the offsets in a vCPU's memory, in bytes, in the order of its touches: one word in each
/// of the first `pages` pages.
pub fn touches(order: Order, pages: u64, seed: u64) -> Vec<u64> {
    let count = usize::try_from(pages).expect("a table of the pages fits into memory");
    let mut touches: Vec<u64> = match order {
        Order::Strided => (0..STRIDE).flat_map(|first| (first..count).step_by(STRIDE)).collect(),
        Order::Sequential | Order::Random => (0..count).collect::<Vec<_>>(),
    }
    .into_iter()
    .map(|page| page as u64)
    .collect();
    if order == Order::Random {
        for index in (1..count).rev() {
            let other = scatter(seed << 40 ^ (index as u64 + 1)) % (index as u64 + 1);
            touches.swap(index, other as usize);
        }
    }
    for touch in &mut touches {
        let word = scatter(!*touch ^ seed) % (PAGE_SIZE / 4);
        *touch = *touch * PAGE_SIZE + word * 4;
    }
    touches
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_page_is_touched_once_in_any_order() {
        for order in [Order::Sequential, Order::Random, Order::Strided] {
            for pages in [1, 511, 512, 5000] {
                let touches = touches(order, pages, 7);
                let touched: HashSet<u64> = touches.iter().map(|at| at / PAGE_SIZE).collect();
                assert_eq!((touches.len() as u64, touched.len() as u64), (pages, pages));
                assert!(touched.iter().all(|page| *page < pages));
            }
        }
        let pages = |order| touches(order, 2000, 7).iter().map(|at| at >> 12).collect::<Vec<_>>();
        assert!(pages(Order::Sequential).is_sorted());
        assert_eq!(pages(Order::Strided)[..5], [0, 512, 1024, 1536, 1]);
        assert!(!pages(Order::Random)[..50].is_sorted());
    }

    #[test]
    fn hot_buffer_pages_differ_and_repeat() {
        let source = HotBuffer::new(1 << 20);
        let page = |index: u64| {
            let mut bytes = vec![0; 4096];
            let mut destination = Destination::from(&mut bytes[..]);
            source.read_through(index * PAGE_SIZE, &mut destination).unwrap();
            drop(destination);
            bytes
        };
        assert!(page(0) != page(1) && page(0) != page(512) && page(0) == page(HOT_PAGES));
        let mut two = vec![0; 8192];
        source.read_through(60 * PAGE_SIZE, &mut Destination::from(&mut two[..])).unwrap();
        assert!(two[..4096] == page(60) && two[4096..] == page(61));
    }
}
