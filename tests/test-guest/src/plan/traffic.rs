// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disk's part of a plan: the sectors of each request.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::content::Random;
use crate::error::PlanError;
use crate::plan::params::DiskParams;
use crate::rings::Direction;

/// The disk before anything ran.
#[derive(Clone, Copy)]
pub(crate) struct Pristine<'a>(pub(crate) &'a File);

impl Pristine<'_> {
    /// Reads the eight bytes at `offset`.
    pub(crate) fn read_u64(&self, offset: u64) -> Result<u64, PlanError> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, offset).map_err(|source| PlanError::Pristine {
            offset,
            len: 8,
            source,
        })?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Allocates sectors and descriptors.
pub(crate) struct DiskBudget {
    params: DiskParams,
    next_write: u64,
    // Per queue: the number of requests so far, and of descriptors in excess of the three for each.
    queues: Vec<(u64, u64)>,
    next: u32,
}

impl DiskBudget {
    pub(crate) fn new(params: &DiskParams) -> Self {
        DiskBudget {
            params: params.clone(),
            next_write: params.read_sectors,
            queues: vec![(0, 0); params.queues.into()],
            next: 0,
        }
    }

    /// Returns the next request's queue, and the maximum number of pieces of its data.
    pub(crate) fn next_queue(&mut self) -> (u16, u64) {
        let queue = self.next % u32::from(self.params.queues);
        self.next += 1;
        let requests = (self.params.requests - queue).div_ceil(self.params.queues.into());
        let spare = u64::from(self.params.queue_size) - 3 * u64::from(requests);
        let (made, extra) = &mut self.queues[queue as usize];
        *made += 1;
        let queue = u16::try_from(queue).expect("it is below the number of queues");
        (queue, 1 + spare * *made / u64::from(requests) - *extra)
    }

    /// Records the actual number of pieces of the data.
    pub(crate) fn took_pieces(&mut self, queue: u16, pieces: u64) {
        self.queues[usize::from(queue)].1 += pieces - 1;
    }

    /// Chooses the direction and the place on the disk of a request of `sectors` sectors. No sector
    /// is written twice, and no written sector is read.
    pub(crate) fn place(&mut self, random: &mut Random, sectors: u64) -> (Direction, u64) {
        let gap = random.below(4);
        let left = self.params.disk_sectors - self.next_write;
        if left >= sectors && random.one_in(2) {
            let sector = self.next_write + gap.min(left - sectors);
            self.next_write = sector + sectors;
            (Direction::Write, sector)
        } else {
            (Direction::Read, random.below(self.params.read_sectors - sectors + 1))
        }
    }
}
