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

pub use crate::actor::{ActorError, run_vmm_actor};
pub use crate::params::{Arrivals, DiskParams, Order, PlanError, PlanParams};
pub use crate::step::{Step, VmmStep, Width};

use crate::content::Content;
use crate::rings::{Request, Rings};
use crate::windows::Windows;

/// The use of a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Not touched.
    Untouched,
    /// Part of the rings, headers and status bytes.
    Rings,
    /// This vCPU reads words of it.
    GuestCheck(u8),
    /// Two vCPUs read words of it, at about the same time.
    GuestCheckShared(u8, u8),
    /// This vCPU writes to it, and reads it back at the end.
    GuestWrite(u8),
    /// This vCPU calls the function in it.
    GuestCall(u8),
    /// The back-end reads from the disk into it; this vCPU checks a part of that.
    DiskRead(u8),
    /// The back-end writes it to the disk.
    DiskWrite,
    /// The VMM reads it.
    VmmCheck,
    /// The VMM writes to it; this vCPU checks that.
    VmmWrite(u8),
}

/// A participant that accesses units.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Actor {
    /// The guest: one vCPU or two.
    Guest,
    /// The back-end.
    BackEnd,
    /// The VMM.
    Vmm,
}

/// The order in which a unit's actors arrive at it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Arrival {
    /// One after the other.
    InTurn([Actor; 3]),
    /// All at once: each waits until all have arrived.
    AtOnce,
    /// Unsynchronised.
    Free,
}

/// A store by the guest or the VMM, and the resulting content of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Store {
    /// Offset in the memory under test.
    pub address: u64,
    /// The final value.
    pub value: u64,
    /// Its width.
    pub width: Width,
}

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) params: PlanParams,
    pub(crate) windows: Windows,
    pub(crate) content: Content,
    pub(crate) programs: Vec<Vec<Step>>,
    pub(crate) vmm: Vec<VmmStep>,
    pub(crate) rings: Option<Rings>,
    pub(crate) roles: Vec<Role>,
    pub(crate) stores: Vec<Store>,
    pub(crate) arrivals: Vec<Arrival>,
    pub(crate) flags: usize,
    pub(crate) guest_touches: u64,
}

impl Plan {
    /// Generates the plan for `params`. `pristine` is the disk before anything runs; it supplies
    /// the words that the guest will check.
    ///
    /// # Errors
    /// If the parameters are inconsistent, or the pristine disk is needed and missing, too short or
    /// unreadable.
    pub fn new(params: PlanParams, pristine: Option<&std::fs::File>) -> Result<Self, PlanError> {
        crate::builder::build(params, pristine)
    }

    /// Returns the plan's parameters.
    pub fn params(&self) -> &PlanParams {
        &self.params
    }

    /// Returns the place of the memory under test in the VM's memory.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Returns the plan's memory image.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Returns the steps of vCPU `cpu`.
    pub fn program(&self, cpu: usize) -> &[Step] {
        &self.programs[cpu]
    }

    /// Returns the VMM's steps, for [`run_vmm_actor`]; empty if it takes no part.
    pub fn vmm_steps(&self) -> &[VmmStep] {
        &self.vmm
    }

    /// Returns all requests to the back-end, in the order of each queue.
    pub fn requests(&self) -> &[Request] {
        self.rings.as_ref().map_or(&[], |rings| rings.requests())
    }

    /// Returns the queues in guest memory, if the plan has a disk.
    pub fn rings(&self) -> Option<&Rings> {
        self.rings.as_ref()
    }

    /// Returns the role of each page.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// Returns the stores by the guest and the VMM, by address; no two overlap.
    pub fn stores(&self) -> &[Store] {
        &self.stores
    }

    /// Returns the order in which actors arrive at each unit.
    pub fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }

    /// Returns the number of flags that the actors need.
    pub fn flags(&self) -> usize {
        self.flags
    }

    /// Returns the number of first accesses of a vCPU to a page (a page that two vCPUs access
    /// counts twice).
    pub fn guest_touches(&self) -> u64 {
        self.guest_touches
    }
}
