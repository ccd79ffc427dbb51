// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resolves the faults of a vCPU at markers, on the vCPU's own thread.

use std::io;
use std::time::{Duration, Instant};

use demand_memory::{PAGE_SIZE, Waiter};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::changes::pause;
use crate::fault::Fault;
use crate::marker_signal::{BusError, MarkerSignal};
use crate::slot_engine::{Stop, Through};
use crate::{FaultError, FaultHandler, StepError};

/// Number of signals in a row, at one page that is present and mapped, after which its memory must
/// have failed. The first may come from a marker that another thread has just replaced.
const FAILED_AFTER: u32 = 3;

/// The faults of one vCPU under [`Engine::UffdPoison`](crate::Engine::UffdPoison), for a run loop
/// of one's own. A [`DemandVcpu`](crate::DemandVcpu) has one.
///
/// KVM sends SIGBUS to the vCPU's thread at a marker, and `KVM_RUN` returns `EINTR`. Outside
/// `KVM_RUN` the thread keeps SIGBUS blocked until paging has ended, so a page source that handles
/// SIGBUS must not do it on this thread. An access of the thread's own to memory that cannot be
/// provided ends the process, as it does without a handler.
///
/// # Examples
///
/// ```
/// use demand_kvm::{FaultHandler, MarkerFaults, VcpuKick};
/// use demand_memory::DemandMemory;
/// use kvm_ioctls::{VcpuExit, VcpuFd};
///
/// /// Runs until the guest halts, or until the vCPU is kicked.
/// fn run(
///     vcpu: &mut VcpuFd,
///     kick: &VcpuKick,
///     handler: &FaultHandler,
///     memory: &DemandMemory,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let mut markers = MarkerFaults::default();
///     kick.attach();
///     markers.fetch_tables(vcpu, handler, memory, kick.waiter())?;
///     loop {
///         markers.prepare(vcpu, handler)?;
///         match vcpu.run() {
///             Ok(VcpuExit::Hlt) => return Ok(()),
///             Ok(VcpuExit::MemoryFault { gpa, size, flags }) => {
///                 handler.handle(gpa, size, flags, kick.waiter())?;
///             }
///             Ok(exit) => panic!("{exit:?}"),
///             Err(error) if error.errno() == libc::EINTR => {
///                 if !markers.resolve(handler, kick.waiter())? {
///                     return Ok(()); // A kick.
///                 }
///             }
///             Err(error) => return Err(error.into()),
///         }
///     }
/// }
/// ```
#[derive(Debug, Default)]
pub struct MarkerFaults {
    signal: MarkerSignal,
    /// The address of the last marker at which nothing kept the vCPU, and how often in a row.
    unmoved: Option<(u64, u32)>,
    /// Whether the guest's page tables were fetched.
    has_tables: bool,
}

impl MarkerFaults {
    /// Prepares the calling thread for the next `KVM_RUN`. The thread is
    /// [attached](crate::VcpuKick::attach) to the vCPU's kick. It makes system calls only when the
    /// thread changes, and when regions with markers appear or are finished.
    ///
    /// # Errors
    ///
    /// The system's error.
    #[inline]
    pub fn prepare(&mut self, vcpu: &VcpuFd, handler: &FaultHandler) -> io::Result<()> {
        self.signal.expect(vcpu, handler.has_markers())
    }

    /// Fetches the page tables of the guest's kernel, at the first call: KVM's own walks fail at
    /// missing ones. Call it when the vCPU's state is set, before it first runs. `memory` is the
    /// VM's memory. It waits as long as the source does.
    ///
    /// # Errors
    ///
    /// [`StepError::Fault`] with [`FaultError::Kicked`], after which it is called again, or
    /// [`FaultError::Stopped`]; [`StepError::Run`] if KVM does not return the vCPU's registers.
    #[inline]
    pub fn fetch_tables(
        &mut self,
        vcpu: &VcpuFd,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
        waiter: &Waiter,
    ) -> Result<(), StepError> {
        if self.has_tables || !handler.has_markers() {
            return Ok(());
        }
        #[cfg(target_arch = "x86_64")]
        {
            let sregs = vcpu.get_sregs().map_err(StepError::Run)?;
            let tables = crate::page_tables::fetch_kernels(&sregs, handler, memory, waiter)?;
            log::debug!("{tables} page tables of the guest's kernel are present");
        }
        self.has_tables = true;
        Ok(())
    }

    /// Resolves the fault that has ended `KVM_RUN` with `EINTR`, if one has: fetches the pages that
    /// are missing, and maps them for the vCPU. Returns false if it was another signal.
    ///
    /// # Errors
    ///
    /// [`FaultError`]; [`FaultError::HostMemory`] if the hardware has lost the page's content.
    pub fn resolve(&mut self, handler: &FaultHandler, waiter: &Waiter) -> Result<bool, FaultError> {
        let resolve = |gpa| {
            let fault = Fault { gpa, size: PAGE_SIZE, stop: Stop::Marker, begun: Instant::now() };
            handler.resolve(&fault, waiter)
        };
        Ok(self.resolve_by(handler, handler.changes.number(), resolve)?.is_some())
    }

    /// Like [`resolve`](Self::resolve), with a function that resolves the fault at a guest address.
    /// `changes` is the number of the handler's changes when the vCPU entered the guest. Returns the
    /// time that it took.
    pub(crate) fn resolve_by(
        &mut self,
        handler: &FaultHandler,
        changes: u64,
        resolve: impl FnOnce(u64) -> Result<(Duration, Through), FaultError>,
    ) -> Result<Option<Duration>, FaultError> {
        let address = match self.signal.take_if_expected() {
            None => return Ok(None),
            Some(BusError::Vcpu(address)) => address,
            Some(BusError::Other) => {
                log::warn!("a vCPU's thread ignores a SIGBUS that is about no access of its vCPU");
                return Ok(Some(Duration::ZERO));
            }
        };
        let gpa = handler.marker_at(address);
        let error = match gpa.map(resolve) {
            Some(Ok((waited, through))) if self.moves_on(gpa, through) => return Ok(Some(waited)),
            Some(Err(error)) => error,
            _ => FaultError::HostMemory { gpa, address },
        };
        match error {
            FaultError::Kicked { .. } => Err(error),
            _ if handler.changes.since(changes) => {
                pause();
                Ok(Some(Duration::ZERO))
            }
            _ => Err(error),
        }
    }

    /// Notes the outcome of a fault; returns false if the vCPU does not get past it.
    fn moves_on(&mut self, gpa: Option<u64>, through: Through) -> bool {
        let before = self.unmoved.take();
        if through == Through::Open {
            return true;
        }
        let times =
            before.filter(|(known, _)| Some(*known) == gpa).map_or(1, |(_, times)| times + 1);
        self.unmoved = gpa.map(|gpa| (gpa, times));
        times < FAILED_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_page_again_has_failed() {
        let mut faults = MarkerFaults::default();
        let mut moves = |gpa, through| faults.moves_on(Some(gpa), through);
        for _ in 0..5 {
            assert!(moves(1, Through::NothingChanged) && moves(1, Through::NothingChanged));
            assert!(moves(2, Through::NothingChanged) && moves(1, Through::NothingChanged));
            assert!(moves(1, Through::NothingChanged) && moves(1, Through::Open));
        }
        assert!(moves(1, Through::NothingChanged) && moves(1, Through::NothingChanged));
        assert!(!moves(1, Through::NothingChanged));
    }
}
