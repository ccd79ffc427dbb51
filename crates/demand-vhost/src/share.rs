// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shares guest memory with a back-end, while pages are missing or when all are present.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use demand_memory::{DemandMemory, FetchError, UnmapError, Waiter};
use demand_uffd::{ArmedMapping, FaultService, Userfaultfd};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::bitmap::Bitmap;

use crate::deadline::while_open;
use crate::regions::{Shared, check_bases};
use crate::{BackEnd, Error, Result};

/// The state of memory sharing with a back-end.
#[derive(Debug)]
pub(crate) enum Sharing {
    /// No memory is shared yet.
    None,
    /// All memory is shared; accesses to missing pages are trapped.
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
}

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
    /// [`Error::NoPagefault`], with nothing shared, if the back-end does not support post-copy; and
    /// an error in every case in which the back-end would read zeros: [`Error::EchoedAddress`],
    /// [`Error::BadBase`], [`Error::Arm`], [`Error::Prefaulted`]. After any error but the first,
    /// the back-end cannot be used any more.
    pub fn share_missing_memory<B: Bitmap>(
        &mut self,
        memory: &DemandMemory<B>,
        service: &Arc<FaultService>,
    ) -> Result<()> {
        const ASKED: &str = "share missing memory with";
        self.expect_nothing_shared(ASKED)?;
        if !self.has_pagefault() {
            return Err(Error::NoPagefault { socket: self.socket().into() });
        }
        let regions = Shared::all(memory)?;
        let infos = regions.iter().map(Shared::info).collect::<Result<Vec<_>>>()?;
        self.in_time(ASKED, |this| {
            let advised = this.ask("begin post-copy with", |f| f.postcopy_advise());
            let fd = advised.map_err(|error| match error {
                Error::Protocol { socket, error, .. } => Error::NoUserfaultfd { socket, error },
                other => other,
            })?;
            let socket = || this.socket().to_path_buf();
            let uffd = Userfaultfd::from_received(OwnedFd::from(fd))
                .map_err(|error| Error::Userfaultfd { socket: socket(), error })?;
            let uffd = Arc::new(uffd);
            this.tell("start listening for faults of", |f| f.postcopy_listen())?;
            let bases = this.ask(ASKED, |f| f.set_mem_table(&infos))?.unwrap_or_default();
            check_bases(this.socket(), &regions, &bases)?;
            // This happens between the back-end's answer and our acknowledgement. The back-end has
            // registered its mappings for MISSING at most. This adds MINOR, without which the
            // back-end would read zeros in partly present huge pages, and fails if the addresses
            // are wrong.
            let armed = regions
                .iter()
                .zip(bases)
                .map(|(region, base)| ArmedMapping::foreign(&uffd, base, &region.pager))
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|error| Error::Arm { socket: this.socket().into(), error })?;
            service.serve(&armed)?;
            // From here on, dropping the `BackEnd` stops the service of its faults.
            this.set_sharing(Sharing::Trapped { regions, uffd, armed, service: service.clone() });
            Ok(())
        })?;
        self.unmap_missing(ASKED)?;
        const ACKNOWLEDGE: &str = "acknowledge the addresses of";
        self.in_time(ACKNOWLEDGE, |this| {
            this.tell(ACKNOWLEDGE, |f| f.postcopy_ack_mem_regions(FrontendReq::SET_MEM_TABLE))
        })?;
        // The acknowledgement has no answer. An answer to the next message shows that the back-end
        // has processed it.
        const BEGIN: &str = "confirm the memory shared with";
        self.in_time(BEGIN, |this| this.ask(BEGIN, |f| f.get_features())).map(drop)
    }

    /// Unmaps from the back-end the missing pages that it touched before its accesses were trapped:
    /// those are mapped, and read as zeros. If the back-end has touched nothing, this costs one
    /// look at each region.
    fn unmap_missing(&self, asked: &'static str) -> Result<()> {
        let (waiter, mut regions) = (Waiter::new(), self.regions(asked)?.iter());
        let unmap = || regions.try_for_each(|region| region.pager.unmap_missing(&waiter));
        while_open(&self.hang_up(), &waiter, unmap)
            .map_err(|error| Error::System { asked: "watch a vhost-user back-end", error })?
            .map_err(|error| match error {
                UnmapError::Fetch(FetchError::Kicked) => self.disconnected(asked),
                error => Error::Prefaulted { socket: self.socket().into(), error },
            })
    }

    /// Shares memory whose pages are all present; nothing is trapped.
    ///
    /// # Errors
    ///
    /// [`Error::Incomplete`], with nothing shared, if pages are missing, and the back-end's errors.
    pub fn share_present_memory<B: Bitmap>(&mut self, memory: &DemandMemory<B>) -> Result<()> {
        const ASKED: &str = "share memory with";
        self.expect_nothing_shared(ASKED)?;
        let regions = Shared::all(memory)?;
        self.expect_complete(ASKED, &regions)?;
        let infos = regions.iter().map(Shared::info).collect::<Result<Vec<_>>>()?;
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_mem_table(&infos)))?;
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
    /// [`Error::Incomplete`], with nothing done, if pages are missing, and the back-end's errors.
    pub fn end_postcopy(&mut self) -> Result<()> {
        const ASKED: &str = "end post-copy with";
        let Sharing::Trapped { regions, uffd, service, .. } = self.sharing() else { return Ok(()) };
        self.expect_complete(ASKED, regions)?;
        let (regions, uffd, service) = (regions.clone(), uffd.clone(), service.clone());
        // Otherwise the back-end's mapping would stay registered until the last descriptor is
        // closed.
        service.release(&uffd)?;
        let ended = self.in_time(ASKED, |this| this.tell(ASKED, |f| f.postcopy_end()));
        uffd.close();
        self.set_sharing(Sharing::Present { regions });
        ended
    }

    fn expect_nothing_shared(&self, asked: &'static str) -> Result<()> {
        match self.sharing() {
            Sharing::None => Ok(()),
            _ => Err(self.wrong_order(asked, "memory is already shared; connect again")),
        }
    }

    fn expect_complete(&self, asked: &'static str, regions: &[Shared]) -> Result<()> {
        match regions.iter().map(Shared::count_missing).sum() {
            0 => Ok(()),
            missing => Err(Error::Incomplete { socket: self.socket().into(), asked, missing }),
        }
    }

    /// Returns the shared regions.
    pub(crate) fn regions(&self, asked: &'static str) -> Result<&[Shared]> {
        match self.sharing() {
            Sharing::Trapped { regions, .. } | Sharing::Present { regions } => Ok(regions),
            Sharing::None => Err(self.wrong_order(asked, "no memory is shared; share it first")),
        }
    }
}
