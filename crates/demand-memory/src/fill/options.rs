// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of background fill: plain data.

use crate::PageRange;

/// The options of background fill.
///
/// # Examples
///
/// ```
/// use demand_memory::{FillOptions, FillOrder, FillRate, InFlight};
///
/// let options = FillOptions {
///     rate: FillRate::BytesPerSecond(100 << 20),
///     in_flight: InFlight::Adaptive { at_most: 16 << 20 },
///     order: FillOrder::NearLastFault,
///     ..FillOptions::default()
/// };
/// assert_eq!(options.chunk, 256 << 10);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FillOptions {
    /// The rate.
    pub rate: FillRate,
    /// The number of bytes that are requested and have not arrived.
    pub in_flight: InFlight,
    /// Bytes per request: at least a page, and rounded down to whole pages. A fault on a page of a
    /// request in flight waits for the whole request.
    pub chunk: u64,
    /// The order.
    pub order: FillOrder,
}

impl FillOptions {
    /// The default of [`chunk`](Self::chunk), in bytes.
    pub const CHUNK: u64 = 256 << 10;
}

impl Default for FillOptions {
    /// Returns the rate of the source, an adaptive number of bytes in flight, requests of 256 KiB,
    /// and ascending order.
    fn default() -> Self {
        FillOptions {
            rate: FillRate::Unlimited,
            in_flight: InFlight::default(),
            chunk: FillOptions::CHUNK,
            order: FillOrder::Ascending,
        }
    }
}

impl From<FillRate> for FillOptions {
    /// Returns the default options with this rate.
    fn from(rate: FillRate) -> Self {
        FillOptions { rate, ..FillOptions::default() }
    }
}

/// The rate of background fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillRate {
    /// The rate of the source.
    Unlimited,
    /// At most this many bytes per second on average.
    BytesPerSecond(u64),
}

/// The number of bytes that background fill has requested and that have not arrived. A source that
/// answers at once never has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// A number that grows while the throughput grows with it, and shrinks while the throughput
    /// does not fall with it. It begins at two requests and never falls below.
    ///
    /// While faults need the source, it follows their delay instead: it grows while that is below
    /// 1.3 times the lowest of the last 30 seconds, and shrinks above 1.5 times. A request that
    /// fails halves it.
    Adaptive {
        /// The largest number, in bytes.
        at_most: u64,
    },
    /// At most this many bytes; at least one request.
    Fixed(u64),
}

impl InFlight {
    /// The default of [`Adaptive`](Self::Adaptive)'s bound, in bytes: 5 Gbit/s at a latency of
    /// 100 ms.
    pub const AT_MOST: u64 = 64 << 20;
}

impl Default for InFlight {
    fn default() -> Self {
        InFlight::Adaptive { at_most: InFlight::AT_MOST }
    }
}

/// The order in which background fill requests missing pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FillOrder {
    /// By region and address, from the first page.
    Ascending,
    /// By region and address, from the last page.
    Descending,
    /// These ranges first, in the order of the list: the working set of an earlier run, for
    /// example. The rest follows in ascending order.
    RangesFirst(Vec<FillRange>),
    /// These ranges in the order of the list, and nothing else: the fill ends after them.
    RangesOnly(Vec<FillRange>),
    /// From the latest fault on, ascending, and from the first page after the last.
    NearLastFault,
}

/// Pages of a region that background fill requests before others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRange {
    /// The index of the region in the list of pagers that the fill was started with.
    pub region: usize,
    /// The pages. Those past the region's end are ignored.
    pub pages: PageRange,
}
