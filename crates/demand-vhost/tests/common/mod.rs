// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory and back-ends that the tests share.
#![allow(dead_code)] // Each test binary uses only a part of this module.

pub(crate) mod foolish;
pub(crate) mod process;

use std::sync::Arc;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, MemfdBacking, PAGE_SIZE, Pager, PagerConfig, Retrier,
    RetryPolicy, Stats,
};
use test_support::image::{self, Control};
use test_support::wait::until;
use vm_memory::GuestAddress;

/// Size of each region in bytes. Guest memory has two regions, one at 0 and one at `HIGH`.
pub(crate) const SIZE: u64 = 6 << 20;
pub(crate) const HIGH: u64 = 1 << 32;
pub(crate) const PAGES: u64 = SIZE / PAGE_SIZE;

/// Returns the word at a guest address (a multiple of 8).
pub(crate) fn word_of(address: u64) -> u64 {
    image::word_of(if address >= HIGH { address - HIGH + SIZE } else { address })
}

/// Returns the guest address of a page; pages are counted through both regions.
pub(crate) fn address_of(page: u64) -> u64 {
    if page < PAGES { page * PAGE_SIZE } else { HIGH + (page - PAGES) * PAGE_SIZE }
}

pub(crate) struct Memory {
    pub(crate) memory: DemandMemory,
    pub(crate) control: Arc<Control>,
    pub(crate) stats: Arc<Stats>,
}

impl Memory {
    pub(crate) fn new(kind: BackingKind) -> Self {
        Self::with(kind, &[0, HIGH])
    }

    pub(crate) fn with(kind: BackingKind, starts: &[u64]) -> Self {
        let (source, control) = image::far(2 * SIZE);
        let source = Arc::new(source);
        let stats = Arc::new(Stats::new());
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        let regions = starts.iter().enumerate().map(|(index, start)| {
            let config = PagerConfig {
                backing: Arc::new(MemfdBacking::new(kind, SIZE).unwrap().with_reservation(false)),
                source: source.clone(),
                image_offset: (index as u64 % 2) * SIZE,
                stats: stats.clone(),
                retrier: retrier.clone(),
            };
            DemandRegion::new(GuestAddress(*start), config, ()).unwrap()
        });
        let memory = DemandMemory::new(regions.collect()).unwrap();
        Memory { memory, control, stats }
    }

    pub(crate) fn pagers(&self) -> Vec<Arc<Pager>> {
        self.memory.pagers().cloned().collect()
    }

    pub(crate) fn fill(&self) {
        for pager in self.memory.pagers() {
            let all = demand_memory::PageRange::new(0, pager.pages());
            pager.fetch(all, demand_memory::FaultPath::Fill).unwrap();
        }
        until("memory is complete", || self.memory.pagers().all(|p| p.bitmap().is_complete()));
    }
}
