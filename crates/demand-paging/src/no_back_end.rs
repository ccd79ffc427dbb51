// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In place of back-ends, without the feature `vhost`.

use demand_memory::DemandRegion;
use vm_memory::GuestAddress;

use crate::{Error, LazyVm};

impl LazyVm {
    pub(crate) fn expect_changeable(&self) -> Result<(), Error> {
        Ok(())
    }

    pub(crate) fn insert_into_back_ends(&self, _: &DemandRegion) -> Result<(), Error> {
        Ok(())
    }

    pub(crate) fn remove_from_back_ends(&self, _: GuestAddress) -> Result<(), Error> {
        Ok(())
    }
}
