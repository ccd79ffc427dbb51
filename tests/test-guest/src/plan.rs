// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Plans of the accesses that the test guest, the back-end and the VMM make to the guest's memory,
//! generated from a seed.
//!
//! Every page of memory has one [`Role`], so that the final value of every byte is known in
//! whatever order the accesses happen; but roles mix within each unit of 2 MiB, and each unit's
//! [`Arrival`] determines the actor that accesses it first.
//!
//! A plan cannot deadlock. It is built as one sequence of steps of all actors, of which each actor
//! executes a subsequence, and a step waits only for steps before it in that sequence. So the first
//! of all pending steps can always be executed. The prerequisites of a step that waits for the
//! back-end (published requests, and the kick) come before it in the same actor's list.

mod builder;
mod params;
mod programs;
mod role;
mod step;
mod traffic;
mod unit;

pub use self::params::{Arrivals, DiskParams, Order, PlanParams};
pub use self::role::{Actor, Arrival, Role, Store};
pub use self::step::{Step, VmmStep, Width};
pub use crate::error::PlanError;

use self::builder::Parts;
use crate::content::Content;
use crate::rings::{Request, Rings};
use crate::windows::Windows;

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    params: PlanParams,
    parts: Parts,
}

impl Plan {
    /// Generates the plan for `params`. `pristine` is the disk before anything runs; it supplies
    /// the words that the guest will check.
    ///
    /// # Errors
    /// If the parameters are inconsistent, or the pristine disk is needed and missing, too short or
    /// unreadable.
    pub fn new(params: PlanParams, pristine: Option<&std::fs::File>) -> Result<Self, PlanError> {
        let parts = builder::build(&params, pristine)?;
        Ok(Plan { params, parts })
    }

    /// Returns the plan's parameters.
    pub fn params(&self) -> &PlanParams {
        &self.params
    }

    /// Returns the place of the memory under test in the VM's memory.
    pub fn windows(&self) -> &Windows {
        &self.parts.windows
    }

    /// Returns the plan's memory image.
    pub fn content(&self) -> &Content {
        &self.parts.content
    }

    /// Returns the steps of vCPU `cpu`.
    pub fn program(&self, cpu: usize) -> &[Step] {
        &self.parts.programs[cpu]
    }

    /// Returns the steps of the VMM, which [`run_vmm_actor`](crate::vmm_actor::run_vmm_actor)
    /// executes; empty if it takes no part.
    pub fn vmm_steps(&self) -> &[VmmStep] {
        &self.parts.vmm
    }

    /// Returns all requests to the back-end, in the order of each queue.
    pub fn requests(&self) -> &[Request] {
        self.parts.rings.as_ref().map_or(&[], |rings| rings.requests())
    }

    /// Returns the queues in guest memory, if the plan has a disk.
    pub fn rings(&self) -> Option<&Rings> {
        self.parts.rings.as_ref()
    }

    /// Returns the role of each page.
    pub fn roles(&self) -> &[Role] {
        &self.parts.roles
    }

    /// Returns the stores by the guest and the VMM, by address; no two overlap.
    pub fn stores(&self) -> &[Store] {
        &self.parts.stores
    }

    /// Returns the order in which actors arrive at each unit.
    pub fn arrivals(&self) -> &[Arrival] {
        &self.parts.arrivals
    }

    /// Returns the number of flags that the actors need.
    pub fn flags(&self) -> usize {
        self.parts.flags
    }

    /// Returns the number of first accesses of a vCPU to a page (a page that two vCPUs access
    /// counts twice).
    pub fn guest_touches(&self) -> u64 {
        self.parts.guest_touches
    }
}
