// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the test guest, the back-end and the VMM do to the guest's memory, made from a seed.
//!
//! Every page of memory has one [`Role`], so that the final value of every byte is known whatever
//! order things happen in; but roles mix within each unit of 2 MiB, and each unit's [`Arrival`]
//! says who comes to it first.
//!
//! A plan cannot deadlock. It is put together as one sequence of steps of all actors, of which
//! each actor gets its own as a subsequence; a step waits only for what steps before it in that
//! sequence do. So of all steps not yet done, the first can always be taken. What a step that
//! waits for the back-end needs (requests published, and the kick) is before it in the same
//! actor's own list.

pub use crate::actor::{ActorError, run_vmm_actor};
pub use crate::params::{Arrivals, DiskParams, Order, PlanError, PlanParams};
pub use crate::step::{Step, VmmStep, Width};

use crate::content::Content;
use crate::rings::{Request, Rings};
use crate::windows::Windows;

/// What becomes of a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Nobody touches it.
    Untouched,
    /// Part of the rings, headers and status bytes.
    Rings,
    /// This vCPU reads words of it.
    GuestCheck(u8),
    /// Two vCPUs read words of it, at about the same time.
    GuestCheckShared(u8, u8),
    /// This vCPU writes to it, and reads it back in the end.
    GuestWrite(u8),
    /// This vCPU calls the function in it.
    GuestCall(u8),
    /// The back-end reads from the disk into it; this vCPU checks some of that.
    DiskRead(u8),
    /// The back-end writes it to the disk.
    DiskWrite,
    /// The VMM reads it.
    VmmCheck,
    /// The VMM writes to it; this vCPU checks that.
    VmmWrite(u8),
}

/// Who comes to a unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Actor {
    /// The guest: one vCPU or two.
    Guest,
    /// The back-end.
    BackEnd,
    /// The VMM.
    Vmm,
}

/// In what order a unit's actors come to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Arrival {
    /// One after the other.
    InTurn([Actor; 3]),
    /// All at once: each waits until all are there.
    AtOnce,
    /// As it happens.
    Free,
}

/// A store that the guest or the VMM makes, and what is in memory after it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Store {
    /// Offset in the memory under test.
    pub address: u64,
    /// The final value.
    pub value: u64,
    /// How much of it.
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
    /// Makes the plan that belongs to `params`. `pristine` is the disk before anything ran; the
    /// words that the guest is going to check are read from it.
    ///
    /// # Errors
    /// If the parameters do not go together, or the pristine disk is needed and missing, too short
    /// or unreadable.
    pub fn new(params: PlanParams, pristine: Option<&std::fs::File>) -> Result<Self, PlanError> {
        crate::builder::build(params, pristine)
    }

    /// What it was made from.
    pub fn params(&self) -> &PlanParams {
        &self.params
    }

    /// Where the memory under test lies in the VM's.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// The image of memory it goes with.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// What vCPU `cpu` does.
    pub fn program(&self, cpu: usize) -> &[Step] {
        &self.programs[cpu]
    }

    /// What the VMM does, see [`run_vmm_actor`]; empty if it does nothing.
    pub fn vmm_steps(&self) -> &[VmmStep] {
        &self.vmm
    }

    /// All requests to the back-end, in the order of each queue.
    pub fn requests(&self) -> &[Request] {
        self.rings.as_ref().map_or(&[], |rings| rings.requests())
    }

    /// The queues in guest memory, if there is a disk.
    pub fn rings(&self) -> Option<&Rings> {
        self.rings.as_ref()
    }

    /// The role of each page.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// What is stored by the guest and the VMM, by address; no two overlap.
    pub fn stores(&self) -> &[Store] {
        &self.stores
    }

    /// In what order actors come to each unit.
    pub fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }

    /// How many flags the actors need.
    pub fn flags(&self) -> usize {
        self.flags
    }

    /// How many times a vCPU comes to a page first thing (a page that two come to counts twice).
    pub fn guest_touches(&self) -> u64 {
        self.guest_touches
    }
}
