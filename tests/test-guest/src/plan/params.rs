// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parameters of a plan.

use serde::{Deserialize, Serialize};

use crate::addresses::MAX_CPUS;
use crate::content::UNIT_BYTES;
use crate::error::{PlanError, refuse};
use crate::rings::MAX_QUEUE_SIZE;
use crate::windows::Windows;

/// Maximum number of requests whose data lies in the same unit.
pub(crate) const REQUESTS_PER_UNIT: u64 = 48;
/// Maximum number of pages of one request's data.
pub(crate) const REQUEST_PAGES: u64 = 8;

/// The order in which actors visit units, and pages within them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// From the first to the last.
    Sequential,
    /// In random order.
    #[default]
    Random,
    /// Every eighth, then again from the second, and so on.
    Strided,
}

/// The order in which actors arrive at a unit.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arrivals {
    /// Each possible order, and all at once, for equally many units each.
    #[default]
    Mixed,
    /// Unsynchronised: no actor waits for another until all work is done, and all requests go to
    /// the back-end before the first answer is waited for.
    Free,
}

/// The disk, and the requests to it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskParams {
    /// Number of queues.
    pub queues: u16,
    /// Number of descriptors in each, a power of two up to 1024; each is used once.
    pub queue_size: u16,
    /// Number of requests, over all queues; at most a third of the descriptors.
    pub requests: u32,
    /// Number of sectors of 512 bytes, from the first, that are only read.
    pub read_sectors: u64,
    /// Size of the disk in sectors of 512 bytes; those after `read_sectors` may be written.
    pub disk_sectors: u64,
}

/// The parameters of a plan: equal parameters yield equal plans.
///
/// # Examples
///
/// ```
/// use test_guest::plan::{Plan, PlanParams};
///
/// let params = PlanParams { seed: 1, memory_bytes: 8 << 20, cpus: 2, ..Default::default() };
/// let json = serde_json::to_string(&params).unwrap();
/// let again = serde_json::from_str(&json).unwrap();
/// assert_eq!(params, again);
/// let plan = Plan::new(params, None).unwrap();
/// assert_eq!(plan.program(0), Plan::new(again, None).unwrap().program(0));
/// ```
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanParams {
    /// The seed of all random choices, including the image.
    pub seed: u64,
    /// Size of the memory under test, a multiple of 2 MiB up to 3 GiB.
    pub memory_bytes: u64,
    /// Size of the VM's memory, a multiple of 2 MiB and at least `memory_bytes`; 0 for the same.
    /// [`Windows`] places the memory under test in it.
    pub vm_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The order in which actors visit units.
    pub order: Order,
    /// The order in which actors arrive at a unit.
    pub arrivals: Arrivals,
    /// Maximum number of pages of each unit that the guest touches.
    pub touches_per_unit: u32,
    /// Maximum number of pages of each unit that the VMM touches; 0 if it takes no part.
    pub vmm_touches_per_unit: u32,
    /// The disk, if any.
    pub disk: Option<DiskParams>,
}

impl Default for PlanParams {
    fn default() -> Self {
        PlanParams {
            seed: 0,
            memory_bytes: 64 << 20,
            vm_bytes: 0,
            cpus: 1,
            order: Order::default(),
            arrivals: Arrivals::default(),
            touches_per_unit: 144,
            vmm_touches_per_unit: 4,
            disk: None,
        }
    }
}

impl PlanParams {
    /// Returns the place of the memory under test in the VM's memory.
    pub(crate) fn windows(&self) -> Result<Windows, PlanError> {
        let vm_bytes = if self.vm_bytes == 0 { self.memory_bytes } else { self.vm_bytes };
        Windows::new(self.memory_bytes, vm_bytes)
    }

    /// Returns the number of units of memory under test.
    pub fn units(&self) -> u64 {
        self.memory_bytes / UNIT_BYTES
    }

    pub(crate) fn check(&self) -> Result<(), PlanError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(refuse("cpus", self.cpus.into(), format!("it must be 1 to {MAX_CPUS}")));
        }
        let Some(disk) = &self.disk else { return Ok(()) };
        if disk.queues == 0 {
            return Err(refuse("queues", 0, "a disk has at least one"));
        }
        if !disk.queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&disk.queue_size) {
            let limit = format!("it must be a power of two from 4 to {MAX_QUEUE_SIZE}");
            return Err(refuse("queue_size", disk.queue_size.into(), limit));
        }
        let most = u64::from(disk.queues) * u64::from(disk.queue_size / 3);
        if u64::from(disk.requests) > most {
            let limit = format!("the queues take {most}, of three descriptors each");
            return Err(refuse("requests", disk.requests.into(), limit));
        }
        let least = REQUEST_PAGES * 8;
        if disk.read_sectors < least {
            let limit = format!("it must be at least {least}");
            return Err(refuse("read_sectors", disk.read_sectors, limit));
        }
        if disk.disk_sectors < disk.read_sectors || disk.disk_sectors > u64::MAX / 512 {
            let limit = format!("it must be at least read_sectors, {}", disk.read_sectors);
            return Err(refuse("disk_sectors", disk.disk_sectors, limit));
        }
        Ok(())
    }
}
