// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The option `--test-guest`: the workload of the test guest.

use std::path::PathBuf;
use std::str::FromStr;

use demand_vmm::cli::parse::{ParseError, Parts, parse_number};
use demand_vmm::config::size::parse_size;
use test_guest::plan::{Arrivals, Order};

/// The value of `--test-guest`, as in `seed=1,order=random,touches=144`: the parts of the test
/// guest's workload that no other option determines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestGuestOption {
    /// Seed of all random choices, the image included.
    pub seed: u64,
    /// Bytes of memory that the guest uses; `None`: all memory.
    pub window: Option<u64>,
    /// The order in which units and pages are touched.
    pub order: Order,
    /// The order in which the guest, the back-end and the VMM reach a unit.
    pub arrivals: Arrivals,
    /// Largest number of pages of each unit that the guest touches.
    pub touches: u32,
    /// Largest number of pages of each unit that the VMM touches.
    pub vmm_touches: u32,
    /// Number of requests to the disk.
    pub requests: u32,
    /// Size of each queue, in descriptors.
    pub queue_size: u16,
    /// Size of the writable area at the end of the disk, in bytes.
    pub write_area: u64,
    /// A file with the disk's content before the run.
    pub pristine: Option<PathBuf>,
    /// The disk that the back-end serves, which is compared after the run.
    pub disk: Option<PathBuf>,
}

impl FromStr for TestGuestOption {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = Parts::new("--test-guest", text)?;
        let path = |path: &str| Ok(PathBuf::from(path));
        let option = TestGuestOption {
            seed: parts.take("seed", parse_number)?.unwrap_or(1),
            window: parts.take("window", |size| Ok(parse_size(size)?))?,
            order: parts.take("order", parse_order)?.unwrap_or(Order::Random),
            arrivals: parts
                .take("arrivals", |name| match name {
                    "mixed" => Ok(Arrivals::Mixed),
                    "free" => Ok(Arrivals::Free),
                    _ => Err(ParseError::Choice("mixed or free")),
                })?
                .unwrap_or(Arrivals::Mixed),
            touches: parts.take("touches", parse_number)?.unwrap_or(144),
            vmm_touches: parts.take("vmm-touches", parse_number)?.unwrap_or(4),
            requests: parts.take("requests", parse_number)?.unwrap_or(64),
            queue_size: parts.take("queue-size", parse_number)?.unwrap_or(256),
            write_area: parts.take("write-area", |size| Ok(parse_size(size)?))?.unwrap_or(0),
            pristine: parts.take("pristine", path)?,
            disk: parts.take("disk", path)?,
        };
        parts.end(
            "seed, window, order, arrivals, touches, vmm-touches, requests, queue-size, write-area, \
             pristine and disk",
        )?;
        Ok(option)
    }
}

fn parse_order(name: &str) -> Result<Order, ParseError> {
    match name {
        "sequential" => Ok(Order::Sequential),
        "random" => Ok(Order::Random),
        "strided" => Ok(Order::Strided),
        _ => Err(ParseError::Choice("sequential, random or strided")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_and_wrong_ones_refused() {
        let option: TestGuestOption =
            "seed=7,window=64M,order=strided,requests=3,disk=/d".parse().unwrap();
        assert_eq!((option.seed, option.order, option.requests), (7, Order::Strided, 3));
        assert_eq!((option.window, option.disk), (Some(64 << 20), Some("/d".into())));
        for text in
            ["seed=x", "window=all", "order=up", "arrivals=late", "queue-size=70000", "speed=1"]
        {
            assert!(text.parse::<TestGuestOption>().is_err(), "{text}");
        }
    }
}
