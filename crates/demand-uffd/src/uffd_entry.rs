// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One userfaultfd that the fault service reads, and the mappings that are armed on it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Instant;

use demand_memory::PageRange;

use crate::fault::{Fault, Outcome, Resolutions};
use crate::gfn::{self, FindPage};
use crate::{ArmedMapping, Event, Userfaultfd};

/// Number of forks of one process after which it is no longer served: each costs a descriptor.
const FORKS: usize = 16;

/// A userfaultfd that is served, with the mappings that are armed on it.
pub(crate) struct UffdEntry {
    uffd: Arc<Userfaultfd>,
    mappings: RwLock<Vec<Arc<ArmedMapping>>>,
    /// Finds the pages for which KVM waits itself, if this userfaultfd was given to KVM.
    find_page: RwLock<Option<Arc<FindPage>>>,
    /// Whether a fault outside all mappings was reported.
    stray_reported: AtomicBool,
    /// Userfaultfds of forked children of the process. They are not served, but kept: if they were
    /// closed, missing pages would read as zeros in the children.
    forks: Mutex<Vec<OwnedFd>>,
}

impl UffdEntry {
    pub(crate) fn new(uffd: Arc<Userfaultfd>) -> Self {
        UffdEntry {
            uffd,
            mappings: RwLock::default(),
            find_page: RwLock::default(),
            stray_reported: AtomicBool::new(false),
            forks: Mutex::default(),
        }
    }

    pub(crate) fn uffd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
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

    /// Serves messages of KVM by `find` from now on.
    pub(crate) fn set_find_page(&self, find: Arc<FindPage>) {
        *self.find_page.write().unwrap_or_else(PoisonError::into_inner) = Some(find);
    }

    fn find_page(&self) -> Option<Arc<FindPage>> {
        self.find_page.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Removes a mapping; returns whether it was the last use of the userfaultfd.
    pub(crate) fn remove(&self, mapping: &Weak<ArmedMapping>) -> bool {
        let mut mappings = self.mappings.write().unwrap_or_else(PoisonError::into_inner);
        let before = mappings.len();
        mappings.retain(|known| !std::ptr::eq(Arc::as_ptr(known), mapping.as_ptr()));
        mappings.is_empty() && before > 0 && self.find_page().is_none()
    }

    fn find(&self, address: u64) -> Option<(Arc<ArmedMapping>, PageRange)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        mappings.iter().find_map(|mapping| Some((mapping.clone(), mapping.granule_at(address)?)))
    }

    /// Returns whether it traps accesses of this process.
    pub(crate) fn is_own(&self) -> bool {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        mappings.first().is_some_and(|mapping| mapping.is_own())
    }

    /// Returns whether a thread of this process is blocked on a fault, or was a moment ago.
    pub(crate) fn has_open_faults(&self) -> bool {
        let mappings = self.mappings();
        mappings.iter().any(|mapping| mapping.is_own())
            && (self.uffd.has_messages() || mappings.iter().any(|m| !m.pending().is_empty()))
    }

    /// Reads the available messages, at most a batch. Returns their number.
    ///
    /// # Errors
    ///
    /// The operating system's error: the userfaultfd cannot be read any more.
    pub(crate) fn read(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        self.uffd.read(events)
    }

    /// Starts serving the faults of messages that were just read.
    ///
    /// # Errors
    ///
    /// The userfaultfd must not be read any more.
    pub(crate) fn dispatch(
        &self,
        resolutions: &Arc<Resolutions>,
        events: &mut Vec<Event>,
    ) -> io::Result<Outcome> {
        let begun = Instant::now();
        let mut outcome = Outcome::Handled;
        // All faults of a batch are waiting already, so resolving a granule once wakes all of them.
        let several = events.len() > 1;
        let mut seen = Vec::new();
        for event in events.drain(..) {
            match event {
                Event::Pagefault { address, .. } => match self.find(address) {
                    Some((mapping, granule)) => {
                        mapping.mark_around(granule);
                        let fault = Fault::new(mapping, granule, begun, resolutions);
                        if several {
                            if seen.contains(&fault.key()) {
                                continue;
                            }
                            seen.push(fault.key());
                        }
                        outcome = outcome.or(fault.start());
                    }
                    None => self.ignore(address),
                },
                Event::Fork(uffd) => {
                    log::error!(
                        "a process with demand-paged memory has forked: its child blocks forever \
                         on missing pages"
                    );
                    let mut forks = self.forks.lock().unwrap_or_else(PoisonError::into_inner);
                    forks.push(uffd);
                    if forks.len() > FORKS {
                        return Err(io::Error::other("its process forks too often"));
                    }
                }
                // Changes of the process to its own mappings show when a fault is resolved.
                Event::Remap { .. } | Event::Remove { .. } | Event::Unmap { .. } => {}
                Event::Gfn { slot, gfn, .. } => match self.find_page() {
                    Some(find) => gfn::start(&self.uffd, &*find, (slot, gfn), begun),
                    None => log::debug!("no region is known for frame {gfn:#x} of slot {slot:#x}"),
                },
                Event::Unknown(event) => {
                    log::debug!("a userfaultfd reported unknown event {event}")
                }
            }
        }
        Ok(outcome)
    }

    /// Ignores a fault on a range that this service does not know: the code that armed the range
    /// must serve it. If its thread were woken, it would fault again at once.
    fn ignore(&self, address: u64) {
        if !self.stray_reported.swap(true, Ordering::Relaxed) {
            log::warn!(
                "cannot serve a fault at address {address:#x}: it lies in no mapping of guest \
                 memory; others like it are not reported"
            );
        }
    }
}
