// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that a VM has at present, while regions come and go.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_memory::DemandMemory;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard};

/// Guest memory whose regions may change: each [load](GuestAddressSpace::memory) returns the memory
/// as it is then.
pub type AddressSpace = GuestMemoryAtomic<DemandMemory>;

/// Guest memory as it was when this was made: it dereferences to a [`DemandMemory`]. While it
/// exists, so do all regions that the guest had then.
pub type MemoryGuard = GuestMemoryLoadGuard<DemandMemory>;

type Callback = Box<dyn FnOnce() + Send>;

/// The memory that a VM has at present, and what waits for its last page.
pub(crate) struct Current {
    space: AddressSpace,
    waiting: Mutex<Vec<Callback>>,
}

impl Current {
    pub(crate) fn new(memory: DemandMemory) -> Arc<Self> {
        let (space, waiting) = (AddressSpace::new(memory), Mutex::default());
        let this = Arc::new(Current { space, waiting });
        this.watch();
        this
    }

    pub(crate) fn space(&self) -> &AddressSpace {
        &self.space
    }

    pub(crate) fn get(&self) -> MemoryGuard {
        self.space.memory()
    }

    /// Gives all users of the memory another one, at once.
    pub(crate) fn replace(self: &Arc<Self>, memory: DemandMemory) {
        self.space.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
        self.watch();
    }

    /// Calls `callback` when no page is missing: at once, or on the thread that publishes the last
    /// page or removes the last region that has any missing.
    pub(crate) fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        self.waiting().push(Box::new(callback));
        // One of the two sees the other: this the last page, or its publisher the callback.
        self.notice();
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Callback>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notices when the memory as it is now becomes complete.
    fn watch(self: &Arc<Self>) {
        // Weak: the memory keeps the callback.
        let this = Arc::downgrade(self);
        self.get().on_complete(move || {
            if let Some(this) = this.upgrade() {
                this.notice();
            }
        });
        // The region with the last missing page may have been removed.
        self.notice();
    }

    fn notice(&self) {
        // A region that came meanwhile may have missing pages. Then its completion is noticed.
        if self.get().pagers().all(|pager| pager.bitmap().is_complete()) {
            let callbacks = std::mem::take(&mut *self.waiting());
            callbacks.into_iter().for_each(|callback| callback());
        }
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Current")
            .field("regions", &self.get().num_regions())
            .finish_non_exhaustive()
    }
}
