// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory: shared while pages are missing, or when all are there.

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

/// What of guest memory a back-end sees.
#[derive(Debug)]
pub(crate) enum Sharing {
    /// Nothing yet.
    None,
    /// All of it; where pages are missing its accesses are trapped.
    Trapped {
        regions: Vec<Shared>,
        uffd: Arc<Userfaultfd>,
        armed: Vec<Arc<ArmedMapping>>,
        service: Arc<FaultService>,
    },
    /// All of it, and all of it is there.
    Present { regions: Vec<Shared> },
}

impl Sharing {
    /// Its mappings in which it may wait for pages.
    pub(crate) fn armed(&self) -> &[Arc<ArmedMapping>] {
        match self {
            Sharing::Trapped { armed, .. } => armed,
            Sharing::None | Sharing::Present { .. } => &[],
        }
    }
}

impl BackEnd {
    /// Shares memory whose pages have not all arrived: the back-end's accesses to missing pages
    /// are trapped through a userfaultfd of its own, and served by `service` from now on.
    ///
    /// It must be the first that the back-end sees of the memory, and comes before the queues. A
    /// back-end that touches memory at once makes this wait for the pages. What it has touched even
    /// before it could be trapped (by `mlockall`, say) is taken from it again. With huge pages this
    /// also fetches, and waits for, the rest of each that has arrived in part, whoever touched it.
    /// [`HangUp`](crate::HangUp) ends these waits.
    ///
    /// A back-end that touches memory before it can be trapped must be shared with before the guest
    /// runs, or while its vCPUs are paused: what exists on its behalf opens the guest's own mapping
    /// too, where that is armed against wholly missing huge pages only, until it is taken away.
    ///
    /// # Errors
    ///
    /// [`Error::NoPagefault`], with nothing shared, if the back-end cannot do it, and a refusal of
    /// everything that would make it read zeros: [`Error::EchoedAddress`], [`Error::BadBase`],
    /// [`Error::Arm`], [`Error::Prefaulted`]. After any error but the first the back-end is of no more use.
    pub fn share_missing_memory<B: Bitmap>(
        &mut self,
        memory: &DemandMemory<B>,
        service: &Arc<FaultService>,
    ) -> Result<()> {
        const ASKED: &str = "share memory that has not arrived";
        self.expect_nothing_shared(ASKED)?;
        if !self.has_pagefault() {
            return Err(Error::NoPagefault { socket: self.socket().into() });
        }
        let regions = Shared::all(memory)?;
        let infos = regions.iter().map(Shared::info).collect::<Result<Vec<_>>>()?;
        self.in_time(ASKED, |this| {
            let advised = this.ask("begin post-copy", |f| f.postcopy_advise());
            let fd = advised.map_err(|error| match error {
                Error::Protocol { socket, error, .. } => Error::NoUserfaultfd { socket, error },
                other => other,
            })?;
            let socket = || this.socket().to_path_buf();
            let uffd = Userfaultfd::from_received(OwnedFd::from(fd))
                .map_err(|error| Error::Userfaultfd { socket: socket(), error })?;
            let uffd = Arc::new(uffd);
            this.tell("have memory trapped", |f| f.postcopy_listen())?;
            let bases = this.ask(ASKED, |f| f.set_mem_table(&infos))?.unwrap_or_default();
            check_bases(this.socket(), &regions, &bases)?;
            // Between its answer and our acknowledgement: it has registered its mappings for
            // MISSING at most. This adds MINOR, without which it would read zeros in half-filled
            // huge pages, and fails if the addresses are wrong.
            let armed = regions
                .iter()
                .zip(bases)
                .map(|(region, base)| ArmedMapping::foreign(&uffd, base, &region.pager))
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|error| Error::Arm { socket: this.socket().into(), error })?;
            service.serve(&armed)?;
            // From here on dropping the back-end ends the service of its faults.
            this.set_sharing(Sharing::Trapped { regions, uffd, armed, service: service.clone() });
            Ok(())
        })?;
        self.unmap_missing(ASKED)?;
        const ACKNOWLEDGE: &str = "acknowledge its addresses";
        self.in_time(ACKNOWLEDGE, |this| {
            this.tell(ACKNOWLEDGE, |f| f.postcopy_ack_mem_regions(FrontendReq::SET_MEM_TABLE))
        })?;
        // The acknowledgement has no answer: that the back-end took it shows in that it answers
        // something else.
        const BEGIN: &str = "begin to use memory";
        self.in_time(BEGIN, |this| this.ask(BEGIN, |f| f.get_features())).map(drop)
    }

    /// Takes from the back-end what it has touched before its accesses were trapped: those pages
    /// are zeros, and mapped. A back-end that has touched nothing costs a look at each region.
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

    /// Shares memory all of whose pages are present: nothing is trapped.
    ///
    /// # Errors
    ///
    /// [`Error::Incomplete`], with nothing shared, if pages are missing, and the back-end's
    /// refusals.
    pub fn share_present_memory<B: Bitmap>(&mut self, memory: &DemandMemory<B>) -> Result<()> {
        const ASKED: &str = "share memory";
        self.expect_nothing_shared(ASKED)?;
        let regions = Shared::all(memory)?;
        self.expect_complete(ASKED, &regions)?;
        let infos = regions.iter().map(Shared::info).collect::<Result<Vec<_>>>()?;
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_mem_table(&infos)))?;
        self.set_sharing(Sharing::Present { regions });
        Ok(())
    }

    /// Ends post-copy, when all pages are present: stops trapping the back-end's accesses, tells
    /// it, and closes its userfaultfd. Without post-copy it does nothing.
    ///
    /// The back-end may be reading the rings for an earlier message; this waits its turn.
    ///
    /// # Errors
    ///
    /// [`Error::Incomplete`], with nothing done, if pages are missing, and the back-end's
    /// refusals.
    pub fn end_postcopy(&mut self) -> Result<()> {
        const ASKED: &str = "end post-copy";
        let Sharing::Trapped { regions, uffd, service, .. } = self.sharing() else { return Ok(()) };
        self.expect_complete(ASKED, regions)?;
        let (regions, uffd, service) = (regions.clone(), uffd.clone(), service.clone());
        // Its own mapping stays registered otherwise, until the last descriptor is closed.
        service.release(&uffd)?;
        let ended = self.in_time(ASKED, |this| this.tell(ASKED, |f| f.postcopy_end()));
        uffd.close();
        self.set_sharing(Sharing::Present { regions });
        ended
    }

    fn expect_nothing_shared(&self, asked: &'static str) -> Result<()> {
        match self.sharing() {
            Sharing::None => Ok(()),
            _ => Err(self.wrong_order(asked, "memory was shared before; connect again")),
        }
    }

    fn expect_complete(&self, asked: &'static str, regions: &[Shared]) -> Result<()> {
        match regions.iter().map(Shared::count_missing).sum() {
            0 => Ok(()),
            missing => Err(Error::Incomplete { socket: self.socket().into(), asked, missing }),
        }
    }

    /// The regions that are shared.
    pub(crate) fn regions(&self, asked: &'static str) -> Result<&[Shared]> {
        match self.sharing() {
            Sharing::Trapped { regions, .. } | Sharing::Present { regions } => Ok(regions),
            Sharing::None => Err(self.wrong_order(asked, "no memory was shared; share it first")),
        }
    }
}
