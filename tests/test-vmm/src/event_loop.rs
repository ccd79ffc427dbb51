// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop that follows a run of the test guest: it waits for the ends of the run's threads, and
//! removes demand paging when the last page is present.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use demand_vmm::error::Error;
use demand_vmm::report::progress::Progress;
use demand_vmm::vcpu::VcpuEvent;
use demand_vmm::vm::machine::Machine;
use test_guest::guest_code::{DONE, PORT_END};
use test_guest::guest_layout::ControlMemory;
use test_guest::vmm_actor::ActorError;

use crate::disk::Disk;
use crate::exits::PortWrite;

/// An event from the threads of a run.
pub(crate) enum Event {
    Port(PortWrite),
    Vcpu(VcpuEvent),
    Actor(Result<(), ActorError>),
    Complete,
    /// The run must end.
    Interrupted,
}

/// Interval between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// The loop that follows a run.
pub(crate) struct EventLoop<'a> {
    /// The progress of memory, if it is printed.
    pub(crate) progress: Option<Progress>,
    pub(crate) machine: &'a Machine,
    pub(crate) control: &'a ControlMemory,
    pub(crate) disk: Option<&'a mut Disk>,
    pub(crate) events: Receiver<Event>,
    /// Whether demand paging has been removed.
    pub(crate) finished: bool,
}

impl EventLoop<'_> {
    /// Waits until all vCPUs and the VMM's actor have ended.
    pub(crate) fn until_done(&mut self, cpus: u32) -> Result<(), Error> {
        // Bit i: vCPU i has not reported its end. (There are at most 64.)
        let (mut running, mut actor) = (u64::MAX >> (64 - cpus.min(64)), true);
        while running != 0 || actor {
            match self.next()? {
                Event::Port(PortWrite { cpu, port: PORT_END, value }) => {
                    self.check_end(cpu, value)?;
                    running &= !(1 << cpu);
                }
                Event::Vcpu(VcpuEvent::Ended { cpu }) if running >> cpu & 1 == 1 => {
                    let step = self.control.result(cpu as usize).step;
                    return Err(Error::failed(format!(
                        "vCPU {cpu} halted at step {step}, before its end; the guest saw wrong \
                         memory content"
                    )));
                }
                Event::Vcpu(VcpuEvent::Ended { .. }) => {}
                Event::Port(PortWrite { cpu, port, .. }) => {
                    return Err(Error::failed(format!(
                        "vCPU {cpu} wrote to port {port:#x}, where no device is"
                    )));
                }
                Event::Vcpu(VcpuEvent::Failed { error, .. }) => return Err(error.into()),
                Event::Actor(outcome) => {
                    outcome.map_err(Error::failed)?;
                    actor = false;
                }
                Event::Complete => self.finish()?,
                Event::Interrupted => {}
            }
        }
        Ok(())
    }

    /// Waits until all pages are present and demand paging is removed.
    pub(crate) fn until_complete(&mut self) -> Result<(), Error> {
        while !self.finished {
            if let Event::Complete = self.next()? {
                self.finish()?;
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Event, Error> {
        loop {
            match self.events.recv_timeout(PROGRESS_EVERY) {
                Ok(Event::Interrupted) => return Err(Error::failed("the run was interrupted")),
                Ok(event) => return Ok(event),
                Err(RecvTimeoutError::Timeout) => self.say_progress(),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::failed("all threads of the VM ended without a result"));
                }
            }
            if let Some(disk) = &mut self.disk {
                disk.check_alive()?;
            }
        }
    }

    fn say_progress(&mut self) {
        if let Some(progress) = &mut self.progress {
            // All pagers count in the same statistics.
            let stats = self.machine.pagers().next().map(|pager| pager.stats());
            let arrived = stats.map_or(0, |stats| stats.pages_arrived());
            progress.set(arrived);
        }
    }

    /// Removes demand paging when the last page is present, the back-end's part first.
    fn finish(&mut self) -> Result<(), Error> {
        if let Some(disk) = &mut self.disk {
            disk.end_postcopy()?;
        }
        self.machine.finish()?;
        self.finished = true;
        self.say_progress();
        Ok(())
    }

    fn check_end(&self, cpu: u32, value: u8) -> Result<(), Error> {
        if u64::from(value) == DONE {
            return Ok(());
        }
        let result = self.control.result(cpu as usize);
        Err(Error::failed(format!(
            "vCPU {cpu}, step {}: expected {:#x} at {:#x}, found {:#x}; the guest saw wrong \
             memory content",
            result.step, result.expected, result.address, result.found
        )))
    }
}
