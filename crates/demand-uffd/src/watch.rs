// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a fault service does for one userfaultfd, and for one fault.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Instant;

use demand_memory::{PAGE_SIZE, PageRange};

use crate::service::Shared;
use crate::{ArmedMapping, BACK_END_CHUNK, Cause, Event, RangeError, Userfaultfd};

/// Pages that are fetched together: a unit of 1 GiB is claimed piece by piece, so that who wants
/// one page of it does not wait for all others.
const FETCH: u64 = BACK_END_CHUNK / PAGE_SIZE;

/// Forks of one process after which it is not served any more: each takes a descriptor.
const FORKS: usize = 16;

/// A userfaultfd that is served, with the mappings that are armed on it.
pub(crate) struct Watch {
    pub(crate) uffd: Arc<Userfaultfd>,
    mappings: RwLock<Vec<Arc<ArmedMapping>>>,
    /// Whether a fault that no mapping knows was reported.
    strange: AtomicBool,
    /// Userfaultfds of children that the process has forked. They are not served, but kept: if
    /// they were closed, missing pages would read as zeros there.
    forks: Mutex<Vec<OwnedFd>>,
}

/// Somebody's wait for a granule.
pub(crate) struct Fault {
    pub(crate) mapping: Arc<ArmedMapping>,
    pub(crate) granule: PageRange,
    /// When its message was read.
    pub(crate) begun: Instant,
    /// Whether a thread of the service tries to resolve it once more.
    pub(crate) again: bool,
}

impl Watch {
    pub(crate) fn new(uffd: Arc<Userfaultfd>) -> Self {
        Watch {
            uffd,
            mappings: RwLock::default(),
            strange: AtomicBool::new(false),
            forks: Mutex::default(),
        }
    }

    pub(crate) fn mappings(&self) -> Vec<Arc<ArmedMapping>> {
        self.mappings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn add(&self, mapping: &Arc<ArmedMapping>) {
        let mut mappings = self.mappings.write().unwrap_or_else(PoisonError::into_inner);
        if !mappings.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            mappings.push(mapping.clone());
        }
    }

    fn find(&self, address: u64) -> Option<(Arc<ArmedMapping>, PageRange)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        mappings.iter().find_map(|mapping| Some((mapping.clone(), mapping.granule_at(address)?)))
    }

    /// Reads a batch of messages and serves them.
    ///
    /// # Errors
    ///
    /// The system's: the userfaultfd cannot be read any more.
    pub(crate) fn serve(&self, shared: &Arc<Shared>, events: &mut Vec<Event>) -> io::Result<()> {
        self.uffd.read(events)?;
        let begun = Instant::now();
        // Who stands in one batch waits already, and is let go on with the first of its granule.
        let mut seen = Vec::with_capacity(events.len());
        for event in events.drain(..) {
            match event {
                Event::Pagefault { address, .. } => match self.find(address) {
                    Some((mapping, granule)) => {
                        let place = (Arc::as_ptr(&mapping), granule.first);
                        if !seen.contains(&place) {
                            seen.push(place);
                            Fault { mapping, granule, begun, again: false }.serve(shared);
                        }
                    }
                    None => self.ignore(address),
                },
                Event::Fork(uffd) => {
                    log::error!(
                        "a process with demand-paged memory has forked; its child waits for ever \
                         when it touches a missing page"
                    );
                    let mut forks = self.forks.lock().unwrap_or_else(PoisonError::into_inner);
                    forks.push(uffd);
                    if forks.len() > FORKS {
                        return Err(io::Error::other("its process forks without end"));
                    }
                }
                // What the process does to its own mappings is seen when a fault is resolved.
                Event::Remap { .. } | Event::Remove { .. } | Event::Unmap { .. } => {}
                Event::Unknown(event) => log::debug!("a userfaultfd told unknown event {event}"),
            }
        }
        Ok(())
    }

    /// Leaves a fault alone that we know nothing of: whoever armed that range must serve it. Were
    /// it woken, it would come back at once.
    fn ignore(&self, address: u64) {
        if !self.strange.swap(true, Ordering::Relaxed) {
            log::warn!(
                "a fault at address {address:#x} lies in no mapping of guest memory; it and \
                 others like it are not served"
            );
        }
    }
}

impl Fault {
    /// Starts making the granule present, and resolves the fault when it is: now, or on the
    /// thread that brings the last page in. Never waits for a page.
    fn serve(self, shared: &Arc<Shared>) {
        if !self.mapping.begin(self.granule) {
            return;
        }
        // Without the region nobody needs its pages.
        let Some(pager) = self.mapping.pager() else { return };
        let mut arrived = 0;
        let mut left = self.granule;
        while !left.is_empty() {
            let part = PageRange::new(left.first, left.count.min(FETCH));
            match pager.fetch(part, self.mapping.path()) {
                Ok(pages) => arrived += pages,
                // The memory was stopped: the fault stays open until its userfaultfd is closed.
                Err(error) => return log::debug!("a fault is left open: {error}"),
            }
            left = PageRange::new(part.end(), left.count - part.count);
        }
        if arrived == self.granule.count && self.mapping.is_mapped_by_pager() {
            // The pager has mapped it on this thread, and woken who waits.
            self.mapping.end(self.granule);
            return self.count();
        }
        let shared = Arc::downgrade(shared);
        pager.bitmap().when_present(self.granule, move || self.resolve(&shared));
    }

    /// Lets those go on that wait for the granule, which is whole.
    pub(crate) fn resolve(self, shared: &Weak<Shared>) {
        self.mapping.end(self.granule);
        let Err(error) = self.mapping.resolve(self.granule) else { return self.count() };
        match error.cause() {
            Cause::Again => match shared.upgrade() {
                Some(shared) => shared.resolve_again(self),
                None => self.give_up(&error),
            },
            Cause::NotRegistered | Cause::ProcessGone | Cause::Closed => {
                log::debug!("a fault needs no answer any more: {error}");
                if let (Cause::ProcessGone, Some(shared)) = (error.cause(), shared.upgrade()) {
                    shared.forget(self.mapping.uffd());
                }
            }
            _ => self.give_up(&error),
        }
    }

    fn give_up(&self, error: &RangeError) {
        log::error!("a fault stays open: {error}");
    }

    fn count(&self) {
        if let Some(pager) = self.mapping.pager() {
            let bytes = self.granule.bytes();
            pager.stats().fault(self.mapping.path(), bytes, self.begun.elapsed());
        }
    }
}
