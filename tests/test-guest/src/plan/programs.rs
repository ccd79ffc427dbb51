// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps of all actors, from the decisions about each unit.

use demand_memory::to_usize;

use crate::addresses::BLK_QUEUE_NOTIFY;
use crate::content::{Content, Random};
use crate::plan::role::{Actor, Arrival, Role, Store};
use crate::plan::step::{Step, VmmStep, Width};
use crate::plan::unit::PageSteps;
use crate::rings::Rings;

// Purposes of random numbers; one per vCPU follows.
const FOR_KICKS: u64 = 0x2ff;
const FOR_TOUCHES: u64 = 0x300;

/// Values of flags.
const ARRIVED: u64 = 1;
const DONE: u64 = 2;

/// A thread that executes steps.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Thread {
    Cpu(usize),
    Vmm,
}

/// One flag each for the owner, its helper, the VMM, and each vCPU as a sender of requests to the
/// back-end.
pub(crate) const fn flags_per_unit(cpus: usize) -> u64 {
    3 + cpus as u64
}

/// Returns the number of a vCPU as in a [`Role`].
pub(crate) fn cpu_number(cpu: usize) -> u8 {
    u8::try_from(cpu).expect("there are at most MAX_CPUS")
}

/// The decisions about one unit.
pub(crate) struct Unit {
    pub(crate) number: u64,
    pub(crate) owner: usize,
    pub(crate) helper: Option<usize>,
    pub(crate) guest_pages: Vec<u64>,
    pub(crate) vmm: Vec<VmmStep>,
    /// Indices of requests.
    pub(crate) requests: std::ops::Range<usize>,
    /// The owner's checks when the unit's other actors are done.
    pub(crate) late: Vec<Step>,
}

/// The facts that the steps of a unit depend on.
pub(crate) struct Facts<'a> {
    pub(crate) content: &'a Content,
    pub(crate) roles: &'a [Role],
    pub(crate) rings: Option<&'a Rings>,
}

/// The steps of all actors, as lists to append to.
pub(crate) struct Programs {
    seed: u64,
    /// Each vCPU's steps.
    cpus: Vec<Vec<Step>>,
    vmm: Vec<VmmStep>,
    /// Each vCPU's steps after it has visited all units: it waits for the back-end,
    finish: Vec<Vec<Step>>,
    /// then checks the other actors' work,
    late: Vec<Vec<Step>>,
    /// then checks its own writes.
    last: Vec<Vec<Step>>,
    /// The stores of the guest and of the VMM.
    pub(crate) stores: Vec<Store>,
}

impl Programs {
    pub(crate) fn new(seed: u64, cpus: usize) -> Self {
        Programs {
            seed,
            cpus: vec![Vec::new(); cpus],
            vmm: Vec::new(),
            finish: vec![Vec::new(); cpus],
            late: vec![Vec::new(); cpus],
            last: vec![Vec::new(); cpus],
            stores: Vec::new(),
        }
    }

    /// Returns the number of vCPUs.
    pub(crate) fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// Returns each vCPU's steps, the VMM's, and all stores.
    pub(crate) fn complete(mut self) -> (Vec<Vec<Step>>, Vec<VmmStep>, Vec<Store>) {
        for (cpu, program) in self.cpus.iter_mut().enumerate() {
            for list in [&mut self.finish, &mut self.late, &mut self.last] {
                program.append(&mut list[cpu]);
            }
        }
        (self.cpus, self.vmm, self.stores)
    }

    /// Waits for all answers before any of them is checked: if the back-end has more requests than
    /// are waited for, the number of its answers does not tell which requests it has answered.
    pub(crate) fn wait_for_all_answers(&mut self, rings: &Rings) {
        let cpus = self.cpus.len();
        for (number, queue) in rings.queues().iter().enumerate() {
            let wait = Step::WaitUsed { address: queue.used_index(), value: queue.requests };
            self.finish[number % cpus].insert(0, wait);
        }
    }

    /// Adds a unit's steps to all actors' lists.
    pub(crate) fn emit(&mut self, unit: &Unit, arrival: Arrival, facts: &Facts<'_>) {
        let guest = self.participants(unit, Actor::Guest, facts);
        let back_end = self.participants(unit, Actor::BackEnd, facts);
        let vmm = self.participants(unit, Actor::Vmm, facts);
        match arrival {
            Arrival::InTurn(order) => {
                let mut before: Vec<(Thread, usize)> = Vec::new();
                for actor in order {
                    let now = self.participants(unit, actor, facts);
                    if now.is_empty() {
                        continue;
                    }
                    for &(thread, flag) in &now {
                        self.wait_for(thread, &before, DONE);
                        self.act(unit, facts, thread, actor);
                        self.answers(unit, facts, thread, actor, false);
                        self.set(thread, flag, DONE);
                    }
                    before = now;
                }
            }
            Arrival::AtOnce => {
                let all = [&back_end[..], &guest, &vmm].concat();
                for &(thread, flag) in &all {
                    self.set(thread, flag, ARRIVED);
                }
                let mut threads: Vec<Thread> = Vec::new();
                for &(thread, _) in &all {
                    if !threads.contains(&thread) {
                        threads.push(thread);
                        self.wait_for(thread, &all, ARRIVED);
                    }
                }
                for (actor, parts) in
                    [(Actor::BackEnd, &back_end), (Actor::Guest, &guest), (Actor::Vmm, &vmm)]
                {
                    for &(thread, _) in parts {
                        self.act(unit, facts, thread, actor);
                    }
                }
                for &(thread, _) in &back_end {
                    self.answers(unit, facts, thread, Actor::BackEnd, false);
                }
                for &(thread, flag) in &all {
                    self.set(thread, flag, DONE);
                }
            }
            Arrival::Free => {
                for (actor, parts) in
                    [(Actor::BackEnd, &back_end), (Actor::Guest, &guest), (Actor::Vmm, &vmm)]
                {
                    for &(thread, _) in parts {
                        self.act(unit, facts, thread, actor);
                        self.answers(unit, facts, thread, actor, true);
                    }
                }
                for &(thread, flag) in &back_end {
                    if let Thread::Cpu(cpu) = thread {
                        self.finish[cpu].push(Step::SetFlag { flag, value: DONE });
                    }
                }
                for &(thread, flag) in &vmm {
                    self.set(thread, flag, DONE);
                }
            }
        }
        if unit.late.is_empty() {
            return;
        }
        // The unit's owner checks the work of the other actors.
        let others = [&back_end[..], &vmm].concat();
        let owner = Thread::Cpu(unit.owner);
        let mut steps: Vec<Step> = others
            .iter()
            .filter(|&&(thread, _)| thread != owner)
            .map(|&(_, flag)| Step::WaitFlag { flag, at_least: DONE })
            .collect();
        steps.extend(&unit.late);
        let list = match arrival {
            Arrival::Free => &mut self.late,
            _ => &mut self.cpus,
        };
        list[unit.owner].append(&mut steps);
    }

    /// Returns the threads that act as `actor` in this unit, each with its flag.
    fn participants(&self, unit: &Unit, actor: Actor, facts: &Facts<'_>) -> Vec<(Thread, usize)> {
        let cpus = self.cpus.len();
        let flag = |slot| to_usize(unit.number * flags_per_unit(cpus)) + slot;
        match actor {
            Actor::Guest => {
                let helper = unit.helper.map(|cpu| (Thread::Cpu(cpu), flag(1)));
                let parts = [Some((Thread::Cpu(unit.owner), flag(0))), helper];
                parts.into_iter().flatten().filter(|_| !unit.guest_pages.is_empty()).collect()
            }
            Actor::Vmm if unit.vmm.is_empty() => Vec::new(),
            Actor::Vmm => vec![(Thread::Vmm, flag(2))],
            Actor::BackEnd => {
                let Some(rings) = facts.rings else { return Vec::new() };
                let requests = &rings.requests()[unit.requests.clone()];
                (0..cpus)
                    .filter(|&cpu| requests.iter().any(|r| usize::from(r.queue) % cpus == cpu))
                    .map(|cpu| (Thread::Cpu(cpu), flag(3 + cpu)))
                    .collect()
            }
        }
    }

    fn set(&mut self, thread: Thread, flag: usize, value: u64) {
        match thread {
            Thread::Cpu(cpu) => self.cpus[cpu].push(Step::SetFlag { flag, value }),
            Thread::Vmm => self.vmm.push(VmmStep::SetFlag { flag, value }),
        }
    }

    fn wait_for(&mut self, thread: Thread, others: &[(Thread, usize)], at_least: u64) {
        for &(_, flag) in others.iter().filter(|&&(other, _)| other != thread) {
            match thread {
                Thread::Cpu(cpu) => self.cpus[cpu].push(Step::WaitFlag { flag, at_least }),
                Thread::Vmm => self.vmm.push(VmmStep::WaitFlag { flag, at_least }),
            }
        }
    }

    /// Adds `thread`'s steps as `actor`; for the back-end, everything up to the kick.
    fn act(&mut self, unit: &Unit, facts: &Facts<'_>, thread: Thread, actor: Actor) {
        match (thread, actor) {
            (Thread::Cpu(cpu), Actor::Guest) => {
                let mut random = Random::new(self.seed, FOR_TOUCHES + cpu as u64, unit.number);
                for &page in &unit.guest_pages {
                    let mine = match facts.roles[to_usize(page)] {
                        Role::GuestCheckShared(one, other) => {
                            [one, other].contains(&cpu_number(cpu))
                        }
                        Role::GuestCheck(mine) | Role::GuestWrite(mine) | Role::GuestCall(mine) => {
                            usize::from(mine) == cpu
                        }
                        _ => false,
                    };
                    if mine {
                        PageSteps {
                            content: facts.content,
                            roles: facts.roles,
                            stores: &mut self.stores,
                            now: &mut self.cpus[cpu],
                            last: &mut self.last[cpu],
                        }
                        .touch(page, &mut random);
                    }
                }
            }
            (Thread::Cpu(cpu), Actor::BackEnd) => {
                let Some(rings) = facts.rings else { return };
                // One kick per request, or one for all.
                let each = kick_each_time(self.seed, unit.number);
                let cpus = self.cpus.len();
                let mut pending: Vec<u16> = Vec::new();
                for request in &rings.requests()[unit.requests.clone()] {
                    let number = request.queue;
                    if usize::from(number) % cpus != cpu {
                        continue;
                    }
                    let address = rings.queues()[usize::from(number)].avail_index();
                    let value = request.index + 1;
                    self.cpus[cpu].push(Step::PublishAvail { address, value });
                    if each {
                        self.cpus[cpu].push(kick(number));
                    } else if !pending.contains(&number) {
                        pending.push(number);
                    }
                }
                self.cpus[cpu].extend(pending.into_iter().map(kick));
            }
            _ => self.vmm.extend(&unit.vmm),
        }
    }

    /// Adds the steps that wait for the back-end's answers to `thread`'s requests in this unit, and
    /// check them. With `later`, the checks come when all units are done and all answers have
    /// arrived.
    fn answers(
        &mut self,
        unit: &Unit,
        facts: &Facts<'_>,
        thread: Thread,
        actor: Actor,
        later: bool,
    ) {
        let (Thread::Cpu(cpu), Actor::BackEnd, Some(rings)) = (thread, actor, facts.rings) else {
            return;
        };
        let cpus = self.cpus.len();
        let list = if later { &mut self.finish[cpu] } else { &mut self.cpus[cpu] };
        let mine = || {
            let requests = rings.requests()[unit.requests.clone()].iter();
            requests.filter(|request| usize::from(request.queue) % cpus == cpu)
        };
        for request in mine().filter(|_| !later) {
            let address = rings.queues()[usize::from(request.queue)].used_index();
            // The back-end may answer in any order. When the number of answers equals the number of
            // requests, it has answered each: earlier requests were waited for in their own unit.
            if !mine().any(|other| other.queue == request.queue && other.index > request.index) {
                list.push(Step::WaitUsed { address, value: request.index + 1 });
            }
        }
        for request in mine() {
            list.push(Step::Check { address: request.status, expect: 0, width: Width::One });
        }
    }
}

fn kick(queue: u16) -> Step {
    Step::Kick { address: BLK_QUEUE_NOTIFY, queue: queue.into() }
}

fn kick_each_time(seed: u64, unit: u64) -> bool {
    Random::new(seed, FOR_KICKS, unit).one_in(2)
}
