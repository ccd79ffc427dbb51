// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The order in which the guest touches its pages.

use demand_memory::{PAGE_SIZE, to_usize};

/// The order in which a vCPU touches its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Sequential,
    /// In random order, the same in each run.
    Random,
    /// One page of each 2 MiB, then the next one of each, and so on.
    Strided,
}

impl Order {
    /// Returns the name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Order::Sequential => "sequential",
            Order::Random => "random",
            Order::Strided => "strided",
        }
    }
}

/// Distance between touches in strided order, in pages: one unit of 2 MiB.
const STRIDE: u64 = 512;

/// Returns a pseudo-random number: the 64-bit finalizer of MurmurHash3.
pub(super) fn scatter(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

/// Returns the offsets in a vCPU's memory, in bytes, in the order of its touches: one word in each
/// of the first `pages` pages.
pub(super) fn touches(order: Order, pages: u64, seed: u64) -> Vec<u64> {
    let mut touches: Vec<u64> = match order {
        Order::Strided => {
            (0..STRIDE).flat_map(|first| (first..pages).step_by(to_usize(STRIDE))).collect()
        }
        Order::Sequential | Order::Random => (0..pages).collect(),
    };
    if order == Order::Random {
        for count in (2..=pages).rev() {
            let other = scatter(seed << 40 ^ count) % count;
            touches.swap(to_usize(count - 1), to_usize(other));
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
}
