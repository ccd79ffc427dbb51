// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inserts memory regions into a back-end that runs, and removes them from it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use demand_memory::DemandRegion;
use demand_uffd::ArmedMapping;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vm_memory::GuestAddress;
use vm_memory::bitmap::Bitmap;

use crate::error::Operation;
use crate::regions::{Shared, check_bases};
use crate::sharing::Sharing;
use crate::{BackEnd, ErrorKind, Result};

/// Interval between checks whether a removed region's faults are resolved.
const LOOK_EVERY: Duration = Duration::from_millis(1);

impl BackEnd {
    /// Checks that regions can be inserted and removed while the memory is shared.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoMemSlots`] if not.
    pub fn expect_mem_slots(&self) -> Result<()> {
        self.expect_mem_slots_to(Operation::ChangeRegions)
    }

    fn expect_mem_slots_to(&self, operation: Operation) -> Result<()> {
        if self.protocol_features().contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return Ok(());
        }
        Err(self.error(operation, ErrorKind::NoMemSlots))
    }

    /// Shares a further region while the back-end runs (ADD_MEM_REG), as
    /// [`share_missing_memory`](Self::share_missing_memory) shares the first ones: its pages may be
    /// missing as long as post-copy has not ended, and the same service serves its faults. The
    /// back-end may use it when this returns. Call it before the guest learns of the region.
    ///
    /// If the back-end touches the region at once, this waits for the pages, as there;
    /// [`HangUp`](crate::HangUp) ends the wait.
    ///
    /// # Errors
    ///
    /// With nothing changed: [`ErrorKind::NoMemSlots`], [`ErrorKind::NoSlotLeft`],
    /// [`ErrorKind::RegionOverlap`], [`ErrorKind::TooHigh`], [`ErrorKind::NoFile`],
    /// [`ErrorKind::Untrappable`], [`ErrorKind::Order`] if no memory is shared yet, and
    /// [`ErrorKind::Incomplete`] if pages are missing and the memory is shared without post-copy, or
    /// post-copy has ended.
    ///
    /// The back-end's errors, and those of [`share_missing_memory`](Self::share_missing_memory).
    /// The back-end then does not have the region; if it does not confirm that, the connection is
    /// closed.
    pub fn insert_region<B: Bitmap>(&mut self, region: &DemandRegion<B>) -> Result<()> {
        let operation = Operation::InsertRegion;
        self.expect_mem_slots_to(operation)?;
        let region = Shared::new(region).map_err(|kind| self.error(operation, kind))?;
        let regions = self.regions(operation)?;
        if let Some(other) = regions.iter().find(|other| other.overlaps(&region)) {
            let (address, other) = (region.guest_address, other.guest_address);
            return Err(self.error(operation, ErrorKind::RegionOverlap { address, other }));
        }
        let is_trapped = matches!(self.sharing(), Sharing::Trapped { .. });
        if !is_trapped {
            self.expect_complete(operation, std::slice::from_ref(&region))?;
        }
        region.expect_trappable().map_err(|kind| self.error(operation, kind))?;
        let (used, info) = (regions.len() as u64, region.info());
        let info = info.map_err(|kind| self.error(operation, kind))?;
        let most =
            self.in_time(operation, |this| this.ask(operation, |f| f.get_max_mem_slots()))?;
        if used >= most {
            return Err(self.error(operation, ErrorKind::NoSlotLeft { most }));
        }
        if is_trapped {
            return self.insert_missing(region, &info);
        }
        self.tell_in_time(operation, |f| f.add_mem_region(&info))?;
        self.sharing_mut().push(region, None);
        Ok(())
    }

    /// Shares a further region through post-copy.
    fn insert_missing(&mut self, region: Shared, info: &VhostUserMemoryRegionInfo) -> Result<()> {
        let operation = Operation::InsertRegion;
        let pager = region.pager.clone();
        let added = self.in_time(operation, |this| {
            let base = this.ask(operation, |f| f.add_mem_region(info))?.unwrap_or_default();
            this.arm(&region, base)
        });
        let shared = added.and_then(|armed| {
            // From here on, dropping the `BackEnd` stops the service of its faults.
            self.sharing_mut().push(region, Some(armed));
            self.unmap_missing(operation, [&pager])
        });
        if let Err(error) = shared {
            self.undo_insertion(info);
            return Err(error);
        }
        self.acknowledge_bases(FrontendReq::ADD_MEM_REG)
    }

    /// Arms the back-end's mapping of a further region, and serves its faults.
    fn arm(&self, region: &Shared, base: u64) -> Result<Arc<ArmedMapping>> {
        let refused = |kind| self.error(Operation::InsertRegion, kind);
        let Sharing::Trapped { regions, uffd, armed, service } = self.sharing() else {
            unreachable!("a region with missing pages was sent without post-copy");
        };
        let bases = armed.iter().map(|mapping| mapping.base()).chain([base]).collect::<Vec<_>>();
        let regions = [&regions[..], std::slice::from_ref(region)].concat();
        check_bases(&regions, &bases).map_err(refused)?;
        let armed = ArmedMapping::foreign(uffd, base, &region.pager)
            .map_err(|error| refused(ErrorKind::Arm(error)))?;
        service.add(std::slice::from_ref(&armed)).map_err(|e| refused(ErrorKind::Service(e)))?;
        Ok(armed)
    }

    /// Takes back a region whose insertion has failed before the back-end might use it.
    fn undo_insertion(&mut self, info: &VhostUserMemoryRegionInfo) {
        self.sharing_mut().remove(info.guest_phys_addr);
        let removed = self.tell_in_time(Operation::RemoveRegion, |f| f.remove_mem_region(info));
        if let Err(error) = removed {
            log::debug!("{error}");
            // It might use the region untrapped after the next acknowledgement.
            self.hang_up().hang_up();
        }
    }

    /// Takes the region at guest address `start` from the back-end while it runs (REM_MEM_REG).
    /// Requests that begin after this do not find it. The guest must have given the region back,
    /// and have no request in flight there: requests that already wait for a page of it get the
    /// page first, but a request that touches a missing page of it only later waits for good. No
    /// ring of the back-end's queues may lie in it.
    ///
    /// Call it before the region's pager is stopped.
    ///
    /// # Errors
    ///
    /// With nothing changed: [`ErrorKind::NoMemSlots`], [`ErrorKind::NoRegion`],
    /// [`ErrorKind::Order`] if no memory is shared, and the back-end's refusal.
    ///
    /// [`ErrorKind::Disconnected`] and [`ErrorKind::Silent`], after which the back-end cannot be
    /// used any more.
    pub fn remove_region(&mut self, start: GuestAddress) -> Result<()> {
        let operation = Operation::RemoveRegion;
        self.expect_mem_slots_to(operation)?;
        let GuestAddress(address) = start;
        let region = self.regions(operation)?.iter().find(|r| r.guest_address == address);
        let info = region
            .ok_or(ErrorKind::NoRegion { address })
            .and_then(Shared::info)
            .map_err(|kind| self.error(operation, kind))?;
        self.tell_in_time(operation, |f| f.remove_mem_region(&info))?;
        let waited = self.await_faults(address);
        self.sharing_mut().remove(address);
        waited
    }

    /// Waits until the faults of the back-end in a region are resolved.
    fn await_faults(&self, address: u64) -> Result<()> {
        let Some(mapping) = self.sharing().armed_at(address) else { return Ok(()) };
        while mapping.has_open_faults() {
            if self.check().is_err() {
                return Err(self.error(Operation::RemoveRegion, ErrorKind::Disconnected));
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}
