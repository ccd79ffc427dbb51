// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves messages about pages of a virtual machine for which KVM itself waits.

use std::sync::Arc;
use std::time::Instant;

use demand_memory::{FaultPath, PAGE_SIZE, PageRange, Pager};

use crate::Userfaultfd;

/// Returns the region's pager, and the page in it, of a memslot's number and a guest frame number.
pub(crate) type FindPage = dyn Fn(u32, u64) -> Option<(Arc<Pager>, u64)> + Send + Sync;

/// Starts fetching the page of a message that was read at `begun`, and wakes the waiter when it is
/// present. Never waits for the page.
pub(crate) fn start(
    uffd: &Arc<Userfaultfd>,
    find: &FindPage,
    (slot, gfn): (u32, u64),
    begun: Instant,
) {
    let Some((pager, page)) = find(slot, gfn) else {
        // KVM notices by itself that a memslot is removed.
        return log::debug!("KVM waits for frame {gfn:#x} of slot {slot:#x}, in no region");
    };
    let page = PageRange::new(page, 1);
    if let Err(error) = pager.fetch(page, FaultPath::HypervisorInternal) {
        // The memory is stopped, and the end of the VM ends the wait.
        return log::debug!("cannot resolve a wait of KVM: {error}");
    }
    let (uffd, stats) = (uffd.clone(), pager.stats().clone());
    pager.when_present(page, move || {
        stats.fault(FaultPath::HypervisorInternal, PAGE_SIZE, begun.elapsed());
        // Any range lets KVM look at its pages. Without it, KVM looks 10 ms later.
        if let Err(error) = uffd.wake(0, PAGE_SIZE) {
            log::debug!("{error}");
        }
    });
}
