// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-ends of a VM.

use std::sync::{Arc, Mutex, Weak};

use demand_memory::DemandRegion;
use demand_vhost::BackEnd;
use vm_memory::{GuestAddress, GuestMemoryRegion};

use crate::vm::{Removed, lock};
use crate::{Error, LazyVm};

impl LazyVm {
    /// Shares the memory with a vhost-user back-end: through post-copy while pages are missing, and
    /// without it if none was missing when the VM got its memory. When the last page is present,
    /// post-copy ends before demand paging is removed. Call it before the guest runs.
    ///
    /// The back-end gets and loses [regions](LazyVm::insert_region) with the VM, until the VMM drops
    /// it. For that it must offer CONFIGURE_MEM_SLOTS.
    ///
    /// # Errors
    ///
    /// [`Error::Share`]: among others, if the back-end cannot wait for missing pages.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use demand_paging::LazyVm;
    /// use demand_paging::demand_vhost::{BackEnd, Options};
    /// use std::sync::{Arc, Mutex};
    ///
    /// # fn connect(vm: &LazyVm) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut disk = BackEnd::connect("blk.sock", Options::default())?;
    /// disk.set_features(disk.features())?;
    /// let disk = Arc::new(Mutex::new(disk));
    /// vm.share_with(&disk)?;
    /// // ... set up its queues, run the guest ...
    /// # Ok(())
    /// # }
    /// ```
    pub fn share_with(&self, back_end: &Arc<Mutex<BackEnd>>) -> Result<(), Error> {
        // The last page may arrive at any time: the removal either comes before, or ends this
        // back-end's post-copy.
        self.before_removal(|removed| {
            let mut locked = lock(back_end);
            if removed == Removed::Yes || self.engine().is_none() {
                locked.share_present_memory(&self.memory())?;
                lock(&self.inner().back_ends).push(Arc::downgrade(back_end));
                return Ok(());
            }
            self.expect_back_ends();
            locked.share_missing_memory(&self.memory(), self.service())?;
            drop(locked);
            lock(&self.inner().back_ends).push(Arc::downgrade(back_end));
            // Weak: a back-end that the VMM has dropped has no post-copy to end.
            let back_end = Arc::downgrade(back_end);
            self.before_finish(move || match back_end.upgrade() {
                Some(back_end) => Ok(lock(&back_end).end_postcopy()?),
                None => Ok(()),
            });
            Ok(())
        })
    }

    /// Returns the back-ends that share the memory.
    fn back_ends(&self) -> Vec<Arc<Mutex<BackEnd>>> {
        let mut back_ends = lock(&self.inner().back_ends);
        back_ends.retain(|back_end| back_end.strong_count() > 0);
        back_ends.iter().filter_map(Weak::upgrade).collect()
    }

    /// Checks that regions can come to all back-ends, and go.
    pub(crate) fn expect_changeable(&self) -> Result<(), Error> {
        self.back_ends().iter().try_for_each(|back_end| Ok(lock(back_end).expect_mem_slots()?))
    }

    /// Gives a region to all back-ends, or to none.
    pub(crate) fn insert_into_back_ends(&self, region: &DemandRegion) -> Result<(), Error> {
        let back_ends = self.back_ends();
        for (index, back_end) in back_ends.iter().enumerate() {
            if let Err(error) = lock(back_end).insert_region(region) {
                if let Err(other) = remove_from(&back_ends[..index], region.start_addr()) {
                    log::warn!("{other}");
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Takes a region from all back-ends.
    pub(crate) fn remove_from_back_ends(&self, start: GuestAddress) -> Result<(), Error> {
        remove_from(&self.back_ends(), start)
    }
}

/// Takes a region from all of these back-ends, and returns the first error.
fn remove_from(back_ends: &[Arc<Mutex<BackEnd>>], start: GuestAddress) -> Result<(), Error> {
    let remove = |back_end: &Arc<Mutex<BackEnd>>| lock(back_end).remove_region(start);
    let removed: Vec<_> = back_ends.iter().map(remove).collect();
    Ok(removed.into_iter().collect::<Result<(), _>>()?)
}
