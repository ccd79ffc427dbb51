// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Converts the decisions about a unit into steps of all its actors.

use crate::builder::{Builder, Unit};
use crate::content::Random;
use crate::guest_layout::BLK_QUEUE_NOTIFY;
use crate::plan::{Actor, Arrival, Role, Step, VmmStep, Width};
use crate::unit::PageSteps;

// Purposes of random numbers; one per vCPU follows.
const FOR_KICKS: u64 = 0x2ff;
const FOR_TOUCHES: u64 = 0x300;

/// Values of flags.
const ARRIVED: u64 = 1;
const DONE: u64 = 2;

/// A thread that executes steps.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Who {
    Cpu(usize),
    Vmm,
}

/// One flag each for the owner, its helper, the VMM, and each vCPU as a sender of requests to the
/// back-end.
pub(crate) const fn flags_per_unit(cpus: usize) -> u64 {
    3 + cpus as u64
}

impl Builder<'_> {
    /// Adds a unit's steps to all actors' lists.
    pub(crate) fn emit(&mut self, unit: Unit, arrival: Arrival) {
        let guest = self.participants(&unit, Actor::Guest);
        let back_end = self.participants(&unit, Actor::BackEnd);
        let vmm = self.participants(&unit, Actor::Vmm);
        match arrival {
            Arrival::InTurn(order) => {
                let mut before: Vec<(Who, usize)> = Vec::new();
                for actor in order {
                    let now = self.participants(&unit, actor);
                    if now.is_empty() {
                        continue;
                    }
                    for &(who, flag) in &now {
                        self.wait_for(who, &before, DONE);
                        self.act(&unit, who, actor);
                        self.answers(&unit, who, actor, false);
                        self.set(who, flag, DONE);
                    }
                    before = now;
                }
            }
            Arrival::AtOnce => {
                let all = [&back_end[..], &guest, &vmm].concat();
                for &(who, flag) in &all {
                    self.set(who, flag, ARRIVED);
                }
                let mut threads: Vec<Who> = Vec::new();
                for &(who, _) in &all {
                    if !threads.contains(&who) {
                        threads.push(who);
                        self.wait_for(who, &all, ARRIVED);
                    }
                }
                for (actor, parts) in
                    [(Actor::BackEnd, &back_end), (Actor::Guest, &guest), (Actor::Vmm, &vmm)]
                {
                    for &(who, _) in parts {
                        self.act(&unit, who, actor);
                    }
                }
                for &(who, _) in &back_end {
                    self.answers(&unit, who, Actor::BackEnd, false);
                }
                for &(who, flag) in &all {
                    self.set(who, flag, DONE);
                }
            }
            Arrival::Free => {
                for (actor, parts) in
                    [(Actor::BackEnd, &back_end), (Actor::Guest, &guest), (Actor::Vmm, &vmm)]
                {
                    for &(who, _) in parts {
                        self.act(&unit, who, actor);
                        self.answers(&unit, who, actor, true);
                    }
                }
                for &(who, flag) in &back_end {
                    if let Who::Cpu(cpu) = who {
                        self.finish[cpu].push(Step::SetFlag { flag, value: DONE });
                    }
                }
                for &(who, flag) in &vmm {
                    self.set(who, flag, DONE);
                }
            }
        }
        if unit.late.is_empty() {
            return;
        }
        // The unit's owner checks the work of the other actors.
        let others = [&back_end[..], &vmm].concat();
        let owner = Who::Cpu(unit.owner);
        let mut steps: Vec<Step> = others
            .iter()
            .filter(|&&(who, _)| who != owner)
            .map(|&(_, flag)| Step::WaitFlag { flag, at_least: DONE })
            .collect();
        steps.extend(&unit.late);
        let list = match arrival {
            Arrival::Free => &mut self.late,
            _ => &mut self.programs,
        };
        list[unit.owner].append(&mut steps);
    }

    /// Returns the threads that act as `actor` in this unit, each with its flag.
    fn participants(&self, unit: &Unit, actor: Actor) -> Vec<(Who, usize)> {
        let cpus = self.programs.len();
        let flag = |slot| (unit.number * flags_per_unit(cpus)) as usize + slot;
        match actor {
            Actor::Guest => {
                let helper = unit.helper.map(|cpu| (Who::Cpu(cpu), flag(1)));
                let parts = [Some((Who::Cpu(unit.owner), flag(0))), helper];
                parts.into_iter().flatten().filter(|_| !unit.guest_pages.is_empty()).collect()
            }
            Actor::Vmm if unit.vmm.is_empty() => Vec::new(),
            Actor::Vmm => vec![(Who::Vmm, flag(2))],
            Actor::BackEnd => {
                let Some(rings) = &self.rings else { return Vec::new() };
                let requests = &rings.requests()[unit.requests.clone()];
                (0..cpus)
                    .filter(|&cpu| requests.iter().any(|r| usize::from(r.queue) % cpus == cpu))
                    .map(|cpu| (Who::Cpu(cpu), flag(3 + cpu)))
                    .collect()
            }
        }
    }

    fn set(&mut self, who: Who, flag: usize, value: u64) {
        match who {
            Who::Cpu(cpu) => self.programs[cpu].push(Step::SetFlag { flag, value }),
            Who::Vmm => self.vmm.push(VmmStep::SetFlag { flag, value }),
        }
    }

    fn wait_for(&mut self, who: Who, others: &[(Who, usize)], at_least: u64) {
        for &(_, flag) in others.iter().filter(|&&(other, _)| other != who) {
            match who {
                Who::Cpu(cpu) => self.programs[cpu].push(Step::WaitFlag { flag, at_least }),
                Who::Vmm => self.vmm.push(VmmStep::WaitFlag { flag, at_least }),
            }
        }
    }

    /// Adds `who`'s steps as `actor`; for the back-end, everything up to the kick.
    fn act(&mut self, unit: &Unit, who: Who, actor: Actor) {
        match (who, actor) {
            (Who::Cpu(cpu), Actor::Guest) => {
                let mut random =
                    Random::new(self.params.seed, FOR_TOUCHES + cpu as u64, unit.number);
                for &page in &unit.guest_pages {
                    let mine = match self.roles[page as usize] {
                        Role::GuestCheckShared(one, other) => [one, other].contains(&(cpu as u8)),
                        Role::GuestCheck(mine) | Role::GuestWrite(mine) | Role::GuestCall(mine) => {
                            usize::from(mine) == cpu
                        }
                        _ => false,
                    };
                    if mine {
                        PageSteps {
                            content: &self.content,
                            roles: &self.roles,
                            stores: &mut self.stores,
                            now: &mut self.programs[cpu],
                            last: &mut self.last[cpu],
                        }
                        .touch(page, &mut random);
                    }
                }
            }
            (Who::Cpu(cpu), Actor::BackEnd) => {
                let Some(rings) = &self.rings else { return };
                // One kick per request, or one for all.
                let each = kick_each_time(self.params.seed, unit.number);
                let cpus = self.programs.len();
                let mut pending: Vec<u16> = Vec::new();
                for request in &rings.requests()[unit.requests.clone()] {
                    let number = request.queue;
                    if usize::from(number) % cpus != cpu {
                        continue;
                    }
                    let address = rings.queues()[usize::from(number)].avail_index();
                    let value = request.index + 1;
                    self.programs[cpu].push(Step::PublishAvail { address, value });
                    if each {
                        self.programs[cpu].push(kick(number));
                    } else if !pending.contains(&number) {
                        pending.push(number);
                    }
                }
                self.programs[cpu].extend(pending.into_iter().map(kick));
            }
            _ => self.vmm.extend(&unit.vmm),
        }
    }

    /// Adds the steps that wait for the back-end's answers to `who`'s requests in this unit, and
    /// check them. With `later`, the checks come when all units are done and all answers have
    /// arrived.
    fn answers(&mut self, unit: &Unit, who: Who, actor: Actor, later: bool) {
        let (Who::Cpu(cpu), Actor::BackEnd, Some(rings)) = (who, actor, &self.rings) else {
            return;
        };
        let cpus = self.programs.len();
        let list = if later { &mut self.finish[cpu] } else { &mut self.programs[cpu] };
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
