// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod bitmap;
mod gate;
mod page;
mod sync;
mod wait;
mod words;

// The model checker explores the words, the claims and the waits; the rest needs a kernel.
#[cfg(not(loom))]
mod arrival;
#[cfg(not(loom))]
mod backing;
#[cfg(not(loom))]
mod errand;
#[cfg(not(loom))]
mod fill;
#[cfg(not(loom))]
mod image;
#[cfg(not(loom))]
mod latency;
#[cfg(not(loom))]
mod load;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod pager;
#[cfg(not(loom))]
mod pool;
#[cfg(not(loom))]
mod region;
#[cfg(not(loom))]
mod retry;
#[cfg(not(loom))]
mod stats;
#[cfg(not(loom))]
mod trap;
#[cfg(not(loom))]
mod unmap;
#[cfg(not(loom))]
mod wait_watch;

pub use bitmap::{BitmapReader, Claimed, MissingBitmap, Published};
pub use page::{PAGE_SIZE, PageRange};
pub use wait::{Wait, Waiter};

#[cfg(not(loom))]
pub use demand_source::{MappedBytes, join_within};

#[cfg(not(loom))]
pub use self::{
    backing::{Backing, BackingError, BackingKind, MemfdBacking, transparent_huge_pages_of_shmem},
    fill::{Fill, FillRate},
    image::{ImageProgress, WriteImageError},
    load::LoadUnit,
    mapping::Mapping,
    memory::DemandMemory,
    pager::{FetchError, GuestTrapError, Pager, PagerError},
    pool::HugePagePool,
    region::{AccessMappingError, DemandRegion, RegionConfig},
    retry::{Failure, Retrier, RetryPolicy},
    stats::{LatencyMicros, Path, PathReport, SourceReport, Stats, TimelineEvent},
    trap::{MappingGuard, Trap, VcpuTrap},
    unmap::UnmapError,
    wait_watch::{PageWait, WaitWatch},
    words::BitmapWords,
};
