// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A simulated machine that executes plans, for tests: its threads take turns at random.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::addresses::BLK_QUEUE_NOTIFY;
use crate::content::{PAGE_BYTES, Random};
use crate::plan::{Plan, Step, VmmStep};

pub(crate) struct Machine<'a> {
    plan: &'a Plan,
    pub(crate) memory: Vec<u8>,
    disk: Option<&'a File>,
    flags: Vec<u64>,
    /// Index of the next step of each vCPU.
    cpus: Vec<usize>,
    vmm: usize,
    /// Per queue: whether it was kicked, the number of chains taken from the available ring, the
    /// requests in flight.
    queues: Vec<(bool, u16, Vec<u16>)>,
    random: Random,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(plan: &'a Plan, disk: Option<&'a File>, seed: u64) -> Self {
        let mut memory = vec![0; plan.params().memory_bytes as usize];
        for (page, bytes) in memory.as_chunks_mut::<PAGE_BYTES>().0.iter_mut().enumerate() {
            plan.content().page(page as u64, bytes);
        }
        let queues = plan.rings().map_or(0, |rings| rings.queues().len());
        for (address, bytes) in plan.rings().iter().flat_map(|rings| rings.writes()) {
            let offset = plan.windows().offset_of(address).unwrap();
            memory[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Machine {
            plan,
            memory,
            disk,
            flags: vec![0; plan.flags()],
            cpus: vec![0; plan.params().cpus as usize],
            vmm: 0,
            queues: vec![(false, 0, Vec::new()); queues],
            random: Random::new(seed, 0x5151, 0),
        }
    }

    /// Runs until all is done. Panics if a check fails, or if no thread can proceed.
    pub(crate) fn run(&mut self) {
        loop {
            let mut live: Vec<usize> = (0..self.cpus.len())
                .filter(|&cpu| self.cpus[cpu] < self.plan.program(cpu).len())
                .collect();
            if self.vmm < self.plan.vmm_steps().len() {
                live.push(self.cpus.len());
            }
            if live.is_empty() {
                // Also answer the requests that no step waits for.
                while self.device() {}
                return;
            }
            live.push(usize::MAX);
            self.random.shuffle(&mut live);
            // One of the threads that can proceed runs for a while.
            let went_on = live.iter().any(|&who| {
                let turns = 1 + self.random.below(40);
                (0..turns).take_while(|_| self.turn(who)).count() > 0
            });
            assert!(went_on, "deadlock: {:?} {} {:?}", self.cpus, self.vmm, self.queues);
        }
    }

    fn turn(&mut self, who: usize) -> bool {
        match who {
            usize::MAX => self.device(),
            vmm if vmm == self.cpus.len() => self.vmm_step(),
            cpu => self.cpu_step(cpu),
        }
    }

    fn bytes(&mut self, address: u64, len: u64) -> &mut [u8] {
        &mut self.memory[address as usize..][..len as usize]
    }

    fn read(&mut self, address: u64, len: u64) -> u64 {
        let mut word = [0; 8];
        word[..len as usize].copy_from_slice(self.bytes(address, len));
        u64::from_le_bytes(word)
    }

    fn write(&mut self, address: u64, len: u64, value: u64) {
        self.bytes(address, len).copy_from_slice(&value.to_le_bytes()[..len as usize]);
    }

    fn cpu_step(&mut self, cpu: usize) -> bool {
        let Some(&step) = self.plan.program(cpu).get(self.cpus[cpu]) else { return false };
        match step {
            Step::Check { address, expect, width } => {
                assert_eq!(self.read(address, width.bytes()), expect, "{step:x?} of {cpu}");
            }
            Step::Write { address, value, width } => self.write(address, width.bytes(), value),
            Step::Add { address, value } => {
                let sum = self.read(address, 8).wrapping_add(value);
                self.write(address, 8, sum);
            }
            Step::Call { address, expect } => {
                assert_eq!(self.read(address, 2), 0xb848);
                assert_eq!(self.read(address + 2, 8), expect);
                assert_eq!(self.read(address + 10, 1), 0xc3);
            }
            Step::PublishAvail { address, value } => {
                assert_eq!(self.read(address, 2) + 1, u64::from(value), "out of order");
                self.write(address, 2, value.into());
            }
            Step::Kick { address, queue } => {
                assert_eq!(address, BLK_QUEUE_NOTIFY);
                self.queues[queue as usize].0 = true;
            }
            Step::WaitUsed { address, value } => {
                let distance = (self.read(address, 2) as u16).wrapping_sub(value);
                if (distance as i16) < 0 {
                    return false;
                }
            }
            Step::WaitFlag { flag, at_least } => {
                if self.flags[flag] < at_least {
                    return false;
                }
            }
            Step::SetFlag { flag, value } => {
                assert!(self.flags[flag] < value, "flag {flag} goes back");
                self.flags[flag] = value;
            }
        }
        self.cpus[cpu] += 1;
        true
    }

    fn vmm_step(&mut self) -> bool {
        let Some(&step) = self.plan.vmm_steps().get(self.vmm) else { return false };
        match step {
            VmmStep::CheckPage { page } => {
                let mut expected = [0; PAGE_BYTES];
                self.plan.content().page(page, &mut expected);
                assert_eq!(self.bytes(page * PAGE_BYTES as u64, PAGE_BYTES as u64), expected);
            }
            VmmStep::Check { address, expect } => assert_eq!(self.read(address, 8), expect),
            VmmStep::Write { address, value } => self.write(address, 8, value),
            VmmStep::WaitFlag { flag, at_least } => {
                if self.flags[flag] < at_least {
                    return false;
                }
            }
            VmmStep::SetFlag { flag, value } => self.flags[flag] = value,
        }
        self.vmm += 1;
        true
    }

    /// Takes a request from a kicked queue, or answers one of those taken.
    fn device(&mut self) -> bool {
        let queues = self.queues.len();
        let start = self.random.below(queues.max(1) as u64) as usize;
        for number in (start..queues).chain(0..start) {
            let queue = self.plan.rings().unwrap().queues()[number].clone();
            let (kicked, taken, _) = self.queues[number];
            if kicked {
                let available = self.read(queue.avail_index(), 2) as u16;
                if available == taken {
                    self.queues[number].0 = false;
                } else {
                    let entry = queue.avail + 4 + 2 * u64::from(taken % queue.size);
                    let head = self.read(entry, 2) as u16;
                    self.queues[number].1 += 1;
                    self.queues[number].2.push(head);
                    return true;
                }
            }
            if !self.queues[number].2.is_empty() {
                let len = self.queues[number].2.len() as u64;
                let which = self.random.below(len) as usize;
                let head = self.queues[number].2.swap_remove(which);
                self.answer(&queue, head);
                return true;
            }
        }
        false
    }

    fn answer(&mut self, queue: &crate::rings::Queue, head: u16) {
        let mut chain = Vec::new();
        let mut next = Some(head);
        while let Some(number) = next {
            let at = queue.descriptors + 16 * u64::from(number);
            let (address, len) = (self.read(at, 8), self.read(at + 8, 4));
            let flags = self.read(at + 12, 2);
            // A piece that is contiguous for the device is contiguous here.
            let offset = self.plan.windows().offset_of(address).unwrap();
            assert_eq!(self.plan.windows().offset_of(address + len - 1), Some(offset + len - 1));
            chain.push((offset, len, flags & 2 != 0));
            next = (flags & 1 != 0).then(|| self.read(at + 14, 2) as u16);
        }
        let [(header, 16, false), data @ .., (status, 1, true)] = &chain[..] else {
            panic!("not a request: {chain:?}");
        };
        let (kind, mut offset) = (self.read(*header, 8), self.read(header + 8, 8) * 512);
        let disk = self.disk.unwrap();
        let mut written = 1;
        for &(address, len, writable) in data {
            assert_eq!(len % 512, 0);
            assert_eq!(writable, kind == 0);
            match kind {
                0 => disk.read_exact_at(self.bytes(address, len), offset).unwrap(),
                1 => disk.write_all_at(self.bytes(address, len), offset).unwrap(),
                _ => panic!("request type {kind}"),
            }
            offset += len;
            written += if writable { len } else { 0 };
        }
        assert_ne!(self.read(*status, 1), 0, "answered before");
        self.write(*status, 1, 0);
        let index = self.read(queue.used_index(), 2);
        let element = queue.used_element(index as u16 % queue.size);
        self.write(element, 4, head.into());
        self.write(element + 4, 4, written);
        self.write(queue.used_index(), 2, index + 1);
    }
}
