// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ties the trap on a mapping of this process to the life of the mapping.

use std::sync::Arc;

use demand_memory::MappingGuard;

use crate::{Modes, Userfaultfd};

/// The trap of a mapping of this process, kept by the mapping. It is a separate type because an
/// armed mapping keeps the mapping: as the guard, it would form a reference cycle.
#[derive(Debug)]
pub(crate) struct OwnGuard {
    pub(crate) uffd: Arc<Userfaultfd>,
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) modes: Modes,
}

impl MappingGuard for OwnGuard {
    fn traps_all(&self) -> bool {
        self.is_active() && self.modes == Modes::ALL
    }

    fn is_active(&self) -> bool {
        !self.uffd.is_closed()
    }

    fn wake(&self) {
        if let Err(error) = self.uffd.wake(self.base, self.len) {
            log::debug!("{error}");
        }
    }

    fn remove(&self) {
        if let Err(error) = self.uffd.unregister(self.base, self.len) {
            log::debug!("{error}");
        }
    }
}
