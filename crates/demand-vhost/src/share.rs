// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shares guest memory with a back-end, while pages are missing or when all are present.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use demand_memory::{DemandMemory, FetchError, Pager, UnmapError, Waiter};
use demand_uffd::{ArmedMapping, FaultService, Userfaultfd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::bitmap::Bitmap;

use crate::deadline::while_open;
use crate::error::Operation;
use crate::regions::{Shared, check_bases};
use crate::sharing::Sharing;
use crate::{BackEnd, ErrorKind, Result};

impl BackEnd {
    /// Shares memory that has missing pages. The back-end's accesses to missing pages are trapped
    /// through a userfaultfd of the back-end's process, and `service` serves them from now on.
    ///
    /// Call it before any other sharing of memory, and before setting up queues. If the back-end
    /// touches memory at once, this call waits for the pages. Pages that the back-end touched even
    /// before they could be trapped (because of `mlockall`, say) are unmapped from it again. With
    /// huge pages, this call also fetches and waits for the missing pages of every partly present
    /// unit, since it cannot know whether the back-end has touched it. [`HangUp`](crate::HangUp)
    /// ends these waits.
    ///
    /// If the back-end may touch memory before it can be trapped, call this before the guest runs,
    /// or while its vCPUs are paused. Units that exist because the back-end touched them also open
    /// the guest's own mapping, if that is armed against wholly missing huge pages only, until they
    /// are unmapped.
    ///
    /// # Errors
    ///
    /// With nothing shared, [`ErrorKind::NoPagefault`], if the back-end does not support post-copy,
    /// and [`ErrorKind::Untrappable`] for memory that no userfaultfd traps. An error in every case in
    /// which the back-end would read zeros: [`ErrorKind::EchoedAddress`], [`ErrorKind::BadBase`],
    /// [`ErrorKind::Arm`], [`ErrorKind::Prefaulted`]. After any error but the first two, the
    /// back-end cannot be used any more.
    pub fn share_missing_memory<B: Bitmap>(
        &mut self,
        memory: &DemandMemory<B>,
        service: &Arc<FaultService>,
    ) -> Result<()> {
        let operation = Operation::ShareMissingMemory;
        self.expect_nothing_shared(operation)?;
        let regions = Shared::all(memory).map_err(|kind| self.error(operation, kind))?;
        let trappable = regions.iter().try_for_each(Shared::expect_trappable);
        trappable.map_err(|kind| self.error(operation, kind))?;
        self.expect_pagefault()?;
        let infos = self.infos(operation, &regions)?;
        self.in_time(operation, |this| {
            let fd = this.receive_userfaultfd()?;
            let uffd = Userfaultfd::from_received(fd).map_err(|error| {
                this.error(Operation::BeginPostcopy, ErrorKind::Userfaultfd(error))
            })?;
            let uffd = Arc::new(uffd);
            this.tell(Operation::Listen, |f| f.postcopy_listen())?;
            let bases = this.ask(operation, |f| f.set_mem_table(&infos))?.unwrap_or_default();
            let refused = |kind| this.error(Operation::ShareMemory, kind);
            check_bases(&regions, &bases).map_err(refused)?;
            // This happens between the back-end's answer and our acknowledgement. The back-end has
            // registered its mappings for MISSING at most. This adds MINOR, without which the
            // back-end would read zeros in partly present huge pages, and fails if the addresses
            // are wrong.
            let armed = regions
                .iter()
                .zip(bases)
                .map(|(region, base)| ArmedMapping::foreign(&uffd, base, &region.pager))
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|error| refused(ErrorKind::Arm(error)))?;
            service.add(&armed).map_err(|error| refused(ErrorKind::Service(error)))?;
            // From here on, dropping the `BackEnd` stops the service of its faults.
            this.set_sharing(Sharing::Trapped { regions, uffd, armed, service: service.clone() });
            Ok(())
        })?;
        self.unmap_missing(operation, self.regions(operation)?.iter().map(|r| &r.pager))?;
        self.acknowledge_bases(FrontendReq::SET_MEM_TABLE)
    }

    /// Acknowledges the addresses in the answer to a request: the back-end may use the memory.
    pub(crate) fn acknowledge_bases(&mut self, request: FrontendReq) -> Result<()> {
        self.tell_in_time(Operation::AcknowledgeAddresses, |f| {
            f.postcopy_ack_mem_regions(request)
        })?;
        // The acknowledgement has no answer. An answer to the next message shows that the back-end
        // has processed it.
        let confirm = Operation::ConfirmMemory;
        self.in_time(confirm, |this| this.ask(confirm, |f| f.get_features())).map(drop)
    }

    /// Receives the userfaultfd of the back-end's process.
    fn receive_userfaultfd(&mut self) -> Result<OwnedFd> {
        let operation = Operation::BeginPostcopy;
        match self.ask(operation, |f| f.postcopy_advise()) {
            Ok(fd) => Ok(OwnedFd::from(fd)),
            Err(error) => Err(match error.into_kind() {
                ErrorKind::Protocol(error) => {
                    self.error(operation, ErrorKind::NoUserfaultfd(error))
                }
                kind => self.error(operation, kind),
            }),
        }
    }

    /// Unmaps from the back-end the missing pages that it touched before its accesses were trapped:
    /// those are mapped, and read as zeros. If the back-end has touched nothing, this costs one
    /// look at each region.
    pub(crate) fn unmap_missing<'a>(
        &self,
        operation: Operation,
        pagers: impl IntoIterator<Item = &'a Arc<Pager>>,
    ) -> Result<()> {
        let (waiter, mut pagers) = (Waiter::new(), pagers.into_iter());
        let unmap = || pagers.try_for_each(|pager| pager.unmap_missing(&waiter));
        while_open(&self.hang_up(), &waiter, unmap)
            .map_err(|error| self.error(Operation::Watch, ErrorKind::System(error)))?
            .map_err(|error| match error {
                UnmapError::Fetch(FetchError::Kicked) => {
                    self.error(operation, ErrorKind::Disconnected)
                }
                error => self.error(Operation::UnmapMissing, ErrorKind::Prefaulted(error)),
            })
    }

    /// Shares memory whose pages are all present; nothing is trapped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Incomplete`], with nothing shared, if pages are missing, and the back-end's errors.
    pub fn share_present_memory<B: Bitmap>(&mut self, memory: &DemandMemory<B>) -> Result<()> {
        let operation = Operation::ShareMemory;
        self.expect_nothing_shared(operation)?;
        let regions = Shared::all(memory).map_err(|kind| self.error(operation, kind))?;
        self.expect_complete(operation, &regions)?;
        let infos = self.infos(operation, &regions)?;
        self.tell_in_time(operation, |f| f.set_mem_table(&infos))?;
        self.set_sharing(Sharing::Present { regions });
        Ok(())
    }

    /// Ends post-copy when all pages are present: stops trapping the back-end's accesses, notifies
    /// it, and closes its userfaultfd. Without post-copy it does nothing.
    ///
    /// The back-end may still be reading the rings for an earlier message; this call waits for
    /// that.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Incomplete`], with nothing done, if pages are missing, and the back-end's errors.
    pub fn end_postcopy(&mut self) -> Result<()> {
        let operation = Operation::EndPostcopy;
        let Sharing::Trapped { regions, uffd, service, .. } = self.sharing() else { return Ok(()) };
        self.expect_complete(operation, regions)?;
        let (regions, uffd, service) = (regions.clone(), uffd.clone(), service.clone());
        // Otherwise the back-end's mapping would stay registered until the last descriptor is
        // closed.
        let released = service.release(&uffd);
        released.map_err(|error| self.error(operation, ErrorKind::Service(error)))?;
        let ended = self.tell_in_time(operation, |f| f.postcopy_end());
        uffd.close();
        self.set_sharing(Sharing::Present { regions });
        ended
    }

    fn expect_nothing_shared(&self, operation: Operation) -> Result<()> {
        match self.sharing() {
            Sharing::None => Ok(()),
            _ => {
                let why = "memory is already shared; connect again";
                Err(self.error(operation, ErrorKind::Order { why }))
            }
        }
    }

    pub(crate) fn expect_complete(&self, operation: Operation, regions: &[Shared]) -> Result<()> {
        match regions.iter().map(Shared::count_missing).sum() {
            0 => Ok(()),
            missing => Err(self.error(operation, ErrorKind::Incomplete { missing })),
        }
    }

    /// Returns the regions as a message describes them.
    fn infos(
        &self,
        operation: Operation,
        regions: &[Shared],
    ) -> Result<Vec<VhostUserMemoryRegionInfo>> {
        let infos: std::result::Result<_, _> = regions.iter().map(Shared::info).collect();
        infos.map_err(|kind| self.error(operation, kind))
    }

    /// Returns the shared regions.
    pub(crate) fn regions(&self, operation: Operation) -> Result<&[Shared]> {
        match self.sharing() {
            Sharing::Trapped { regions, .. } | Sharing::Present { regions } => Ok(regions),
            Sharing::None => {
                let why = "no memory is shared; share it first";
                Err(self.error(operation, ErrorKind::Order { why }))
            }
        }
    }
}
