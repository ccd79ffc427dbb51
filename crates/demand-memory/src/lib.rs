// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod arrival;
mod backing;
mod bitmap;
mod errand;
mod error;
mod extents;
mod failure_log;
mod fetch_notes;
mod fill;
mod guest_mapping;
mod image;
mod latency;
mod load;
mod mapping;
mod memory;
mod page;
mod pager;
mod pool;
mod readahead;
mod region;
mod retry;
mod stats;
mod sync;
mod touches;
mod trap;
mod unanswered;
mod unmap;
mod vm_file;
mod wait_watch;

pub use bitmap::{BitmapReader, Claimed, MissingBitmap, Published, Wait, Waiter};
pub use page::{PAGE_SIZE, PageRange};

pub use demand_source::{MappedBytes, OwnProcess, join_within, to_usize};

pub use self::{
    backing::{
        Backing, BackingError, BackingKind, MemfdBacking, ParseBackingKindError,
        TransparentHugePagesError, transparent_huge_pages_of_shmem,
    },
    error::{FetchError, GuestTrapError, PagerError},
    fill::{Fill, FillOptions, FillOrder, FillRange, FillRate, InFlight},
    guest_mapping::{GuestMapping, GuestMappingError},
    image::{ImageProgress, WriteImageError},
    load::LoadUnit,
    mapping::Mapping,
    memory::DemandMemory,
    pager::{Pager, PagerConfig},
    pool::HugePagePool,
    region::{AccessMappingError, DemandRegion},
    retry::{Failure, Retrier, RetryPolicy},
    stats::{
        FaultPath, LatencyCounts, LatencyMicros, PathReport, SourceReport, Stats, TimelineEvent,
    },
    touches::{Hold, Touch, TouchCounts, TouchLog},
    trap::{MapPresent, Mapped, MappingGuard, VcpuTrap},
    unmap::UnmapError,
    vm_file::VmFileBacking,
    wait_watch::{PageWait, WaitWatch},
};
#[cfg(not(loom))] // The model checker has words of its own.
pub use bitmap::BitmapWords;
