// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's waits for missing pages in those of its own accesses that would otherwise fail.

use std::error::Error;
use std::os::fd::AsFd;
use std::sync::Arc;

use demand_kvm::{FaultHandler, PageMessages};
use demand_memory::PAGE_SIZE;
use demand_uffd::{FaultService, Features, Userfaultfd};
use kvm_ioctls::VmFd;

/// Makes KVM wait, and the service provide the pages, until the returned value is dropped. Returns
/// `None`, and leaves everything as it is, if the kernel or the permissions of this process do not
/// allow that: the pages must then be fetched before KVM touches them.
pub(crate) fn begin(
    vm: &Arc<VmFd>,
    handler: &Arc<FaultHandler>,
    service: &FaultService,
) -> Option<PageMessages> {
    let begun = || -> Result<PageMessages, Box<dyn Error>> {
        // It traps no mapping, and needs no feature.
        let uffd = Arc::new(Userfaultfd::open(Features::from_bits(0))?);
        let messages = PageMessages::register(vm, uffd.try_clone_fd()?.as_fd())?;
        let handler = handler.clone();
        let find = move |_slot, gfn: u64| handler.page_at(gfn.checked_mul(PAGE_SIZE)?);
        service.serve_gfns(&uffd, find)?;
        Ok(messages)
    };
    begun()
        .inspect_err(|error| log::debug!("some accesses of KVM fail at missing pages: {error}"))
        .ok()
}
