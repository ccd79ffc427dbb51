// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds a plan, unit by unit in the order in which all actors arrive at them.

use std::fs::File;

use demand_memory::to_usize;

use crate::content::{Content, PAGE_BYTES, PAGE_WORDS, Random};
use crate::error::PlanError;
use crate::plan::params::{Arrivals, PlanParams, REQUEST_PAGES, REQUESTS_PER_UNIT};
use crate::plan::programs::{Facts, Programs, Unit, cpu_number, flags_per_unit};
use crate::plan::role::{Actor, Arrival, Role, Store};
use crate::plan::step::{Step, VmmStep, Width};
use crate::plan::traffic::{DiskBudget, Pristine};
use crate::plan::unit::{FreePages, guest_role, put_in_order};
use crate::rings::{Direction, Rings, Segment};
use crate::windows::Windows;

const PAGE: u64 = PAGE_BYTES as u64;
const SECTOR: u64 = 512;
const PAGE_SECTORS: u64 = PAGE / SECTOR;

// Purposes of random numbers.
const FOR_ORDER: u64 = 0x200;
const FOR_ARRIVALS: u64 = 0x201;
const FOR_UNIT: u64 = 0x202;

/// The parts of a plan that follow from its parameters.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
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

struct Builder<'a> {
    params: &'a PlanParams,
    content: Content,
    pristine: Option<Pristine<'a>>,
    disk: Option<DiskBudget>,
    rings: Option<Rings>,
    roles: Vec<Role>,
    programs: Programs,
    guest_touches: u64,
}

/// Builds the parts of the plan for `params`.
pub(crate) fn build(params: &PlanParams, pristine: Option<&File>) -> Result<Parts, PlanError> {
    params.check()?;
    let windows = params.windows()?;
    if params.disk.is_some() && pristine.is_none() {
        return Err(PlanError::NoPristine);
    }
    let content = Content::new(params.seed);
    let cpus = params.cpus as usize;
    let rings = params
        .disk
        .as_ref()
        .map(|disk| Rings::new(&content, &windows, params.seed, disk.queues, disk.queue_size))
        .transpose()?;
    let mut builder = Builder {
        params,
        content,
        pristine: pristine.map(Pristine),
        disk: params.disk.as_ref().map(DiskBudget::new),
        rings,
        roles: vec![Role::Untouched; (params.memory_bytes / PAGE) as usize],
        programs: Programs::new(params.seed, cpus),
        guest_touches: 0,
    };
    let arrivals = builder.arrivals();
    builder.all_units(&arrivals)?;
    let Builder { content, rings, roles, programs, guest_touches, .. } = builder;
    let (programs, vmm, mut stores) = programs.complete();
    stores.sort_unstable_by_key(|store| store.address);
    let flags = to_usize(params.units() * flags_per_unit(cpus));
    Ok(Parts {
        windows,
        content,
        programs,
        vmm,
        rings,
        roles,
        stores,
        arrivals,
        flags,
        guest_touches,
    })
}

impl Builder<'_> {
    /// Returns the order in which actors arrive at each unit.
    fn arrivals(&self) -> Vec<Arrival> {
        use Actor::{BackEnd, Guest, Vmm};
        let kinds: &[Arrival] = match self.params.arrivals {
            Arrivals::Free => &[Arrival::Free],
            Arrivals::Mixed => &[
                Arrival::InTurn([Guest, BackEnd, Vmm]),
                Arrival::InTurn([BackEnd, Guest, Vmm]),
                Arrival::AtOnce,
                Arrival::InTurn([Vmm, BackEnd, Guest]),
                Arrival::InTurn([Guest, Vmm, BackEnd]),
                Arrival::InTurn([BackEnd, Vmm, Guest]),
                Arrival::InTurn([Vmm, Guest, BackEnd]),
            ],
        };
        let mut arrivals: Vec<Arrival> =
            kinds.iter().copied().cycle().take(to_usize(self.params.units())).collect();
        Random::new(self.params.seed, FOR_ARRIVALS, 0).shuffle(&mut arrivals);
        arrivals
    }

    fn all_units(&mut self, arrivals: &[Arrival]) -> Result<(), PlanError> {
        self.set_rings_aside();
        let mut order: Vec<u64> = (0..self.params.units()).collect();
        let mut random = Random::new(self.params.seed, FOR_ORDER, 0);
        put_in_order(&mut order, self.params.order, &mut random);

        let requests = self.params.disk.as_ref().map_or(0, |disk| u64::from(disk.requests));
        let room = |builder: &Self, unit: u64| {
            FreePages::new(unit, &builder.roles).count() as u64 >= REQUESTS_PER_UNIT * REQUEST_PAGES
        };
        let roomy = order.iter().filter(|&&unit| room(self, unit)).count() as u64;
        if requests > roomy * REQUESTS_PER_UNIT {
            let limit = format!("this memory has room for {}", roomy * REQUESTS_PER_UNIT);
            return Err(PlanError::OutOfRange { what: "requests", value: requests, limit });
        }
        let mut seen = 0;
        for number in order {
            let mut count = 0;
            if room(self, number) {
                count = (seen + 1) * requests / roomy - seen * requests / roomy;
                seen += 1;
            }
            let unit = self.decide(number, count)?;
            let facts =
                Facts { content: &self.content, roles: &self.roles, rings: self.rings.as_ref() };
            self.programs.emit(&unit, arrivals[to_usize(number)], &facts);
        }
        if let (Arrivals::Free, Some(rings)) = (self.params.arrivals, &self.rings) {
            self.programs.wait_for_all_answers(rings);
        }
        Ok(())
    }

    fn set_rings_aside(&mut self) {
        let Some(rings) = &self.rings else { return };
        for pages in rings.pages() {
            self.roles[to_usize(pages.start)..to_usize(pages.end)].fill(Role::Rings);
        }
    }

    /// Assigns a role to each of the unit's pages.
    fn decide(&mut self, number: u64, requests: u64) -> Result<Unit, PlanError> {
        let mut random = Random::new(self.params.seed, FOR_UNIT, number);
        let cpus = self.programs.cpus();
        let owner = to_usize(number) % cpus;
        let helper = (cpus > 1 && random.one_in(2))
            .then(|| (owner + 1 + to_usize(random.below(cpus as u64 - 1))) % cpus);
        let first = self.rings.as_ref().map_or(0, |rings| rings.requests().len());
        let mut unit = Unit {
            number,
            owner,
            helper,
            guest_pages: Vec::new(),
            vmm: Vec::new(),
            requests: first..first + to_usize(requests),
            late: Vec::new(),
        };
        let mut free = FreePages::new(number, &self.roles);
        for _ in 0..requests {
            self.request(&mut unit, &mut free, &mut random)?;
        }
        self.vmm_pages(&mut unit, &mut free, &mut random);
        let touches = self.params.touches_per_unit as usize;
        unit.guest_pages = free.take_scattered(&mut random, touches);
        for &page in &unit.guest_pages {
            let helper = helper.map(cpu_number);
            let role = guest_role(&self.content, page, cpu_number(owner), helper, &mut random);
            self.roles[to_usize(page)] = role;
            self.guest_touches += 1 + u64::from(matches!(role, Role::GuestCheckShared(..)));
        }
        put_in_order(&mut unit.guest_pages, self.params.order, &mut random);
        Ok(unit)
    }

    /// Adds one request for pages of the unit.
    fn request(
        &mut self,
        unit: &mut Unit,
        free: &mut FreePages,
        random: &mut Random,
    ) -> Result<(), PlanError> {
        let (Some(disk), Some(rings)) = (&mut self.disk, &mut self.rings) else { return Ok(()) };
        let (queue, pieces) = disk.next_queue();
        let most = 1 + random.below(REQUEST_PAGES);
        let mut runs = Vec::new();
        if pieces > 1 && random.one_in(2) {
            let pages = free.take_scattered(random, to_usize(most.min(pieces)));
            runs.extend(pages.into_iter().map(|page| (page, 1)));
        } else {
            runs.extend(free.take_run(random, most));
        }
        disk.took_pieces(queue, runs.len() as u64);
        let data: Vec<Segment> = runs.iter().map(|&run| segment(run, random)).collect();
        let sectors = data.iter().map(|segment| u64::from(segment.len)).sum::<u64>() / SECTOR;
        let (direction, sector) = disk.place(random, sectors);
        let role = match direction {
            Direction::Read => Role::DiskRead(cpu_number(unit.owner)),
            Direction::Write => Role::DiskWrite,
        };
        for (first, count) in runs {
            self.roles[to_usize(first)..to_usize(first + count)].fill(role);
        }
        let request = rings.push(queue, direction, sector, data);
        let (Direction::Read, Some(pristine)) = (direction, self.pristine) else { return Ok(()) };
        let width = Width::Eight;
        for (segment, offset) in request.pieces() {
            let (start, len) = (segment.address, u64::from(segment.len));
            for at in [0, 8 * random.below(len / 8), len - 8] {
                let expect = pristine.read_u64(offset + at)?;
                unit.late.push(Step::Check { address: start + at, expect, width });
            }
            // The part of a page that the back-end did not write still has the image's content.
            if !start.is_multiple_of(PAGE) {
                let expect = self.content.read_u64(start - 8);
                unit.late.push(Step::Check { address: start - 8, expect, width });
            }
            if !(start + len).is_multiple_of(PAGE) {
                let expect = self.content.read_u64(start + len);
                unit.late.push(Step::Check { address: start + len, expect, width });
            }
        }
        Ok(())
    }

    fn vmm_pages(&mut self, unit: &mut Unit, free: &mut FreePages, random: &mut Random) {
        let mut left = u64::from(self.params.vmm_touches_per_unit);
        while left > 0 {
            // Sometimes two adjacent pages, and an access that spans both.
            let most = 1 + u64::from(random.one_in(4));
            let Some((page, count)) = free.take_run(random, most.min(left)) else { return };
            left -= count;
            let index = random.below(PAGE_WORDS);
            let (address, before) = (page * PAGE + 8 * index, self.content.word(page, index));
            if count == 2 {
                let address = (page + 1) * PAGE - 1 - random.below(7);
                let expect = self.content.read_u64(address);
                unit.vmm.push(VmmStep::Check { address, expect });
            } else {
                match random.below(4) {
                    0 => unit.vmm.push(VmmStep::CheckPage { page }),
                    1 => unit.vmm.push(VmmStep::Check { address, expect: before }),
                    which => {
                        let value = random.next();
                        if which == 2 {
                            unit.vmm.push(VmmStep::Check { address, expect: before });
                        }
                        unit.vmm.push(VmmStep::Write { address, value });
                        self.programs.stores.push(Store { address, value, width: Width::Eight });
                        let check = Step::Check { address, expect: value, width: Width::Eight };
                        unit.late.push(check);
                        self.roles[to_usize(page)] = Role::VmmWrite(cpu_number(unit.owner));
                        continue;
                    }
                }
            }
            self.roles[to_usize(page)..to_usize(page + count)].fill(Role::VmmCheck);
        }
    }
}

/// Returns a segment in some of the sectors of adjacent pages.
fn segment((first, count): (u64, u64), random: &mut Random) -> Segment {
    let mut cut = |most: u64| if random.one_in(3) { random.below(most) } else { 0 };
    let head = cut(PAGE_SECTORS);
    let tail = cut(if count == 1 { PAGE_SECTORS - head } else { PAGE_SECTORS });
    let len = (count * PAGE_SECTORS - head - tail) * SECTOR;
    Segment {
        address: first * PAGE + head * SECTOR,
        len: u32::try_from(len).expect("a request has a few pages"),
    }
}
