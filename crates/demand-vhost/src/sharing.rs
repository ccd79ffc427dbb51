// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that is shared with a back-end so far: none, trapped, or present.

use std::sync::Arc;

use demand_uffd::{ArmedMapping, FaultService, Userfaultfd};

use crate::regions::Shared;

/// The memory that is shared with a back-end.
#[derive(Debug)]
pub(crate) enum Sharing {
    /// No memory is shared yet.
    None,
    /// All memory is shared; accesses to missing pages are trapped. Each region has an armed
    /// mapping at the same index.
    Trapped {
        regions: Vec<Shared>,
        uffd: Arc<Userfaultfd>,
        armed: Vec<Arc<ArmedMapping>>,
        service: Arc<FaultService>,
    },
    /// All memory is shared, and all its pages are present.
    Present { regions: Vec<Shared> },
}

impl Sharing {
    /// Returns the back-end's armed mappings, in which it may wait for pages.
    pub(crate) fn armed(&self) -> &[Arc<ArmedMapping>] {
        match self {
            Sharing::Trapped { armed, .. } => armed,
            Sharing::None | Sharing::Present { .. } => &[],
        }
    }

    /// Returns the back-end's armed mapping of the region at a guest address, if it is armed.
    pub(crate) fn armed_at(&self, address: u64) -> Option<&Arc<ArmedMapping>> {
        let Sharing::Trapped { regions, armed, .. } = self else { return None };
        armed.get(regions.iter().position(|region| region.guest_address == address)?)
    }

    /// Adds a region, with its armed mapping if missing pages are trapped.
    pub(crate) fn push(&mut self, region: Shared, mapping: Option<Arc<ArmedMapping>>) {
        match self {
            Sharing::Trapped { regions, armed, .. } => {
                regions.push(region);
                armed.extend(mapping);
            }
            Sharing::Present { regions } => regions.push(region),
            Sharing::None => {}
        }
    }

    /// Removes the region at a guest address, if it is shared; its faults are no longer served.
    pub(crate) fn remove(&mut self, address: u64) {
        let is_it = |region: &Shared| region.guest_address == address;
        match self {
            Sharing::Trapped { regions, armed, service, .. } => {
                if let Some(index) = regions.iter().position(is_it) {
                    regions.remove(index);
                    service.remove(&armed.remove(index));
                }
            }
            Sharing::Present { regions } => regions.retain(|region| !is_it(region)),
            Sharing::None => {}
        }
    }
}
