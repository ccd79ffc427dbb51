// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Assigns roles to the pages of a unit of memory, and generates the steps for each page.

use demand_memory::to_usize;

use crate::content::{Class, Content, PAGE_BYTES, PAGE_WORDS, Random, UNIT_PAGES};
use crate::plan::params::Order;
use crate::plan::role::{Role, Store};
use crate::plan::step::{Step, Width};

const PAGE: u64 = PAGE_BYTES as u64;

/// The pages of a unit that have no role yet.
pub(crate) struct FreePages {
    first: u64,
    free: Vec<bool>,
}

impl FreePages {
    pub(crate) fn new(unit: u64, roles: &[Role]) -> Self {
        let first = unit * UNIT_PAGES;
        let roles = &roles[to_usize(first)..to_usize(first + UNIT_PAGES)];
        FreePages { first, free: roles.iter().map(|&role| role == Role::Untouched).collect() }
    }

    pub(crate) fn count(&self) -> usize {
        self.free.iter().filter(|&&free| free).count()
    }

    /// Takes up to `most` adjacent pages at a random place. Returns the first page and the number
    /// of pages.
    pub(crate) fn take_run(&mut self, random: &mut Random, most: u64) -> Option<(u64, u64)> {
        let start = to_usize(random.below(UNIT_PAGES));
        let at = (start..self.free.len()).chain(0..start).find(|&page| self.free[page])?;
        let mut count = 0;
        while count < most && self.free.get(at + to_usize(count)) == Some(&true) {
            self.free[at + to_usize(count)] = false;
            count += 1;
        }
        Some((self.first + at as u64, count))
    }

    /// Takes up to `most` pages from random places.
    pub(crate) fn take_scattered(&mut self, random: &mut Random, most: usize) -> Vec<u64> {
        let mut pages: Vec<usize> = (0..self.free.len()).filter(|&page| self.free[page]).collect();
        random.shuffle(&mut pages);
        pages.truncate(most);
        for &page in &pages {
            self.free[page] = false;
        }
        pages.into_iter().map(|page| self.first + page as u64).collect()
    }
}

/// Sorts numbers into the order in which they are visited.
pub(crate) fn put_in_order(items: &mut [u64], order: Order, random: &mut Random) {
    match order {
        Order::Sequential => items.sort_unstable(),
        Order::Strided => items.sort_unstable_by_key(|&item| (item % 8, item)),
        Order::Random => {
            items.sort_unstable();
            random.shuffle(items);
        }
    }
}

/// Chooses a role for a page that the guest accesses.
pub(crate) fn guest_role(
    content: &Content,
    page: u64,
    owner: u8,
    helper: Option<u8>,
    random: &mut Random,
) -> Role {
    let cpu = helper.filter(|_| random.one_in(4)).unwrap_or(owner);
    if content.class(page) == Class::Code && random.one_in(2) {
        return Role::GuestCall(cpu);
    }
    match (random.below(8), helper) {
        (0..=3, _) => Role::GuestCheck(cpu),
        (4, Some(helper)) => Role::GuestCheckShared(owner, helper),
        _ => Role::GuestWrite(cpu),
    }
}

/// One vCPU's steps for pages, as lists to append to.
pub(crate) struct PageSteps<'a> {
    pub(crate) content: &'a Content,
    pub(crate) roles: &'a [Role],
    pub(crate) stores: &'a mut Vec<Store>,
    /// Steps to execute now.
    pub(crate) now: &'a mut Vec<Step>,
    /// Steps to execute when all work is done.
    pub(crate) last: &'a mut Vec<Step>,
}

impl PageSteps<'_> {
    /// Adds the accesses to a page that its role requires.
    pub(crate) fn touch(&mut self, page: u64, random: &mut Random) {
        match self.roles[to_usize(page)] {
            Role::GuestCheck(_) | Role::GuestCheckShared(..) => {
                self.check(page, random);
                if random.one_in(4) {
                    self.check(page, random);
                }
            }
            Role::GuestCall(_) => {
                let expect = self.content.code_value(page);
                self.now.push(Step::Call { address: page * PAGE, expect });
            }
            Role::GuestWrite(_) => {
                self.write(page, random);
            }
            role => unreachable!("{role:?} is not the guest's"),
        }
    }

    fn check(&mut self, page: u64, random: &mut Random) {
        let start = page * PAGE;
        let word = start + 8 * random.below(PAGE_WORDS);
        let (address, width) = match random.below(16) {
            10 => (start + 4 * random.below(PAGE / 4), Width::Four),
            11 => (start + 2 * random.below(PAGE / 2), Width::Two),
            12 => (start + random.below(PAGE), Width::One),
            13 | 14 => (start + random.below(PAGE - 7), Width::Eight),
            15 if self.may_cross(page) => (start + PAGE - 1 - random.below(7), Width::Eight),
            _ => (word, Width::Eight),
        };
        let value = match width {
            Width::Eight => self.content.read_u64(address),
            _ => self.content.read_u64(address - address % 8) >> (address % 8 * 8),
        };
        self.now.push(Step::Check { address, expect: width.cut(value), width });
    }

    /// Returns whether a read may extend into the next page: it must be in the same unit, and only
    /// read.
    fn may_cross(&self, page: u64) -> bool {
        let next = page + 1;
        !next.is_multiple_of(UNIT_PAGES)
            && matches!(
                self.roles[to_usize(next)],
                Role::GuestCheck(_) | Role::GuestCheckShared(..)
            )
    }

    fn write(&mut self, page: u64, random: &mut Random) {
        let index = random.below(PAGE_WORDS);
        let address = page * PAGE + 8 * index;
        let before = self.content.word(page, index);
        let check = Step::Check { address, expect: before, width: Width::Eight };
        let value = random.next();
        let (address, value, width) = match random.below(4) {
            // The first access is an addition.
            0 => {
                self.now.push(Step::Add { address, value });
                (address, before.wrapping_add(value), Width::Eight)
            }
            // The first access is a store.
            1 => {
                self.now.push(Step::Write { address, value, width: Width::Eight });
                (address, value, Width::Eight)
            }
            2 => {
                self.now.push(check);
                self.now.push(Step::Write { address, value, width: Width::Eight });
                (address, value, Width::Eight)
            }
            _ => {
                self.now.push(check);
                let width = [Width::One, Width::Two, Width::Four][to_usize(random.below(3))];
                let offset = width.bytes() * random.below(8 / width.bytes());
                let (address, value) = (address + offset, width.cut(value));
                self.now.push(Step::Write { address, value, width });
                (address, value, width)
            }
        };
        self.stores.push(Store { address, value, width });
        self.last.push(Step::Check { address, expect: value, width });
        if random.one_in(4) {
            // Another word of the page: unwritten words still have the image's content.
            let index = (index + 1 + random.below(PAGE_WORDS - 1)) % PAGE_WORDS;
            let (address, expect) = (page * PAGE + 8 * index, self.content.word(page, index));
            self.last.push(Step::Check { address, expect, width: Width::Eight });
        }
    }
}
