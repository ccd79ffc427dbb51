// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU of a VM with demand-paged memory.

use std::sync::Arc;

use demand_kvm::{
    CompleteIo, DemandVcpu, FaultError, FaultHandler, Step, StepError, hide_nested, own_pages,
};
use demand_memory::Waiter;
use kvm_bindings::{CpuId, Msrs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestAddress, GuestAddressSpace};

use crate::Error;
use crate::current::AddressSpace;
use crate::vcpus::Place;

/// A vCPU of a [`LazyVm`](crate::LazyVm): a [`DemandVcpu`] that knows the VM's memory, fetches the
/// pages that KVM itself reads before its state is set, and stops when the VM ends.
///
/// It may be dropped before or after the VM's handle.
///
/// # Examples
///
/// See [`LazyVm`](crate::LazyVm).
#[derive(Debug)]
pub struct LazyVcpu {
    vcpu: DemandVcpu,
    place: Arc<Place>,
    handler: Arc<FaultHandler>,
    memory: AddressSpace,
    hides_nested: bool,
}

impl LazyVcpu {
    pub(crate) fn new(
        vcpu: DemandVcpu,
        place: Arc<Place>,
        handler: Arc<FaultHandler>,
        memory: AddressSpace,
        hides_nested: bool,
    ) -> Self {
        LazyVcpu { vcpu, place, handler, memory, hides_nested }
    }

    /// Runs the vCPU until its next exit; exits at missing pages are handled: see
    /// [`DemandVcpu::step`]. It waits as long as the source does, unless the vCPU is
    /// [kicked](demand_kvm::VcpuKick::kick). A kick does not reach a wait inside KVM itself, as under
    /// engine `uffd`, above all where KVM emulates the guest: see "Kicking a vCPU" in the
    /// [README of demand-kvm](demand_kvm).
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] once the VM's handle is dropped; the guest does not run after that.
    /// [`Error::Step`] otherwise.
    pub fn step(&mut self) -> Result<Step<'_>, Error> {
        let _inside = self.place.enter()?;
        let step = self.vcpu.step(&self.handler, &*self.memory.memory());
        step.map_err(|error| failed(&self.place, error))
    }

    /// Takes a step towards a state that can be saved, without running the guest: see
    /// [`DemandVcpu::complete_pending_io`].
    ///
    /// # Errors
    ///
    /// As for [`step`](Self::step).
    pub fn complete_pending_io(&mut self) -> Result<CompleteIo<'_>, Error> {
        let _inside = self.place.enter()?;
        let step = self.vcpu.complete_pending_io(&self.handler, &*self.memory.memory());
        step.map_err(|error| failed(&self.place, error))
    }

    /// Sets the vCPU's CPUID. If this host's KVM may access missing pages for nested guests, nested
    /// virtualization is hidden from the guest.
    ///
    /// # Errors
    ///
    /// [`Error::Set`].
    pub fn set_cpuid2(&self, cpuid: &CpuId) -> Result<(), Error> {
        let mut cpuid = cpuid.clone();
        if self.hides_nested {
            hide_nested(&mut cpuid);
        }
        let set = self.vcpu.fd().set_cpuid2(&cpuid);
        set.map_err(|source| Error::Set { what: "CPUID", source })
    }

    /// Sets the system registers, after the pages from which KVM reads more of the state have been
    /// fetched.
    ///
    /// # Errors
    ///
    /// [`Error::OwnPages`], [`Error::Set`] and [`Error::Ended`].
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.fetch(&own_pages(&[], Some(sregs)))?;
        let set = self.vcpu.fd().set_sregs(sregs);
        set.map_err(|source| Error::Set { what: "system registers", source })
    }

    /// Sets model-specific registers, after the pages that they name to KVM have been fetched.
    /// Returns how many were set: KVM stops at the first one that it refuses.
    ///
    /// # Errors
    ///
    /// As for [`set_sregs`](Self::set_sregs).
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<usize, Error> {
        self.fetch(&own_pages(msrs.as_slice(), None))?;
        let set = self.vcpu.fd().set_msrs(msrs);
        set.map_err(|source| Error::Set { what: "model-specific registers", source })
    }

    /// Fetches pages, and waits for them until the VM ends.
    fn fetch(&self, pages: &[GuestAddress]) -> Result<(), Error> {
        match self.handler.fetch_pages(pages, &Waiter::new()) {
            Ok(()) => Ok(()),
            Err(FaultError::Stopped { .. }) => Err(Error::Ended),
            Err(error) => Err(Error::OwnPages(error)),
        }
    }

    /// Returns the vCPU of KVM, to inspect it and to set state that names no memory. For state that
    /// does, use the methods of this type.
    pub fn fd(&self) -> &VcpuFd {
        self.vcpu.fd()
    }

    /// Returns the vCPU below, for all that this type does not do: its kick, its pending exit, and
    /// the times for which its guest was held up.
    pub fn demand(&self) -> &DemandVcpu {
        &self.vcpu
    }

    /// Returns the vCPU below for calls that need exclusive access.
    pub fn demand_mut(&mut self) -> &mut DemandVcpu {
        &mut self.vcpu
    }
}

/// Returns the error of a step. After the VM's end, whatever failed failed because of it.
fn failed(place: &Place, error: StepError) -> Error {
    match error {
        StepError::Fault(FaultError::Stopped { .. }) => Error::Ended,
        _ if place.end().is_reached() => Error::Ended,
        error => Error::Step(error),
    }
}
