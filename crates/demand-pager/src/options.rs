// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options of a connection to a pager.

use std::time::Duration;

use crate::protocol::MOST_OPEN;

/// The limits of a [`PagerSource`](crate::PagerSource).
///
/// # Examples
///
/// ```
/// use demand_pager::PagerOptions;
///
/// let options = PagerOptions { fill_window: 2, ..PagerOptions::default() };
/// assert_eq!(options.demand_window, 256);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagerOptions {
    /// Most faults of demand that wait for the pager's answer at a time, 1 to 512. Long requests,
    /// such as a huge page of 1 GiB, have a quarter of that for themselves, beside it.
    pub demand_window: usize,
    /// Most faults of background fill that wait for an answer at a time, 1 to 256.
    pub fill_window: usize,
    /// Longest time to connect, and to wait for the pager's greeting.
    pub connect: Duration,
    /// Pause before connecting again. It doubles until a connection lasts for a second.
    pub pause: Duration,
    /// Longest pause before connecting again.
    pub longest_pause: Duration,
}

impl Default for PagerOptions {
    /// Returns 256 faults of demand and 8 of fill, 10 s to connect, and pauses from 10 ms to
    /// 250 ms.
    fn default() -> Self {
        PagerOptions {
            demand_window: 256,
            fill_window: 8,
            connect: Duration::from_secs(10),
            pause: Duration::from_millis(10),
            longest_pause: Duration::from_millis(250),
        }
    }
}

impl PagerOptions {
    /// Returns the most open faults of demand, of long requests, and of fill.
    pub(crate) fn windows(&self) -> [usize; 3] {
        let demand = self.demand_window.clamp(1, MOST_OPEN / 2);
        [demand, (demand / 4).max(1), self.fill_window.clamp(1, MOST_OPEN / 4)]
    }
}
