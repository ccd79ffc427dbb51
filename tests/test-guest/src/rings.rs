// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Split virtqueues with all their requests, laid out before the guest starts.
//!
//! They lie in demand-paged memory from 2 MiB on, each part of each queue in separate pages; if
//! that memory lies in several windows, so do the parts of a queue. Addresses in this module are
//! offsets in the memory under test, except those that the device reads from descriptors. The VMM
//! writes descriptors, available rings and headers before the guest starts ([`Rings::writes`]); the
//! guest writes the index of the available ring, step by step. The pages with status bytes keep the
//! image's content, in which these bytes are not 0. Each descriptor is used once; chains are
//! scattered over the table.

use std::ops::Range;

use demand_memory::to_usize;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use crate::content::{Class, Content, PAGE_BYTES, Random, UNIT_BYTES};
use crate::error::{PlanError, refuse};
use crate::windows::{Window, Windows};

/// Maximum number of descriptors in a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Offset of the rings in the first window.
pub const RINGS_ADDRESS: u64 = UNIT_BYTES;

const PAGE: u64 = PAGE_BYTES as u64;
const HEADER_BYTES: u64 = 16;
const DESCRIPTOR_BYTES: u64 = 16;
const FOR_CHAINS: u64 = 0x100;

/// The direction of a request's data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the disk into memory.
    Read,
    /// From memory to the disk.
    Write,
}

/// A piece of a request's data, in one descriptor; whole sectors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Offset in the memory under test.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Index of the queue.
    pub queue: u16,
    /// Its index in the queue's available ring.
    pub index: u16,
    /// Its descriptors: for the header, the data and the status.
    pub chain: Vec<u16>,
    /// The direction of its data.
    pub direction: Direction,
    /// The first sector on the disk.
    pub sector: u64,
    /// Its data.
    pub data: Vec<Segment>,
    /// Its header: an offset in the memory under test.
    pub header: u64,
    /// Its status byte, likewise.
    pub status: u64,
}

impl Request {
    /// Returns the number of bytes of data.
    pub fn bytes(&self) -> u64 {
        self.data.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Returns the descriptor that identifies it in the rings.
    pub fn head(&self) -> u16 {
        self.chain[0]
    }

    /// Returns the number of bytes that the device may write, including the status.
    pub fn writable_bytes(&self) -> u64 {
        match self.direction {
            Direction::Read => self.bytes() + 1,
            Direction::Write => 1,
        }
    }

    /// Returns each piece of data, with the offset of its bytes on the disk.
    pub fn pieces(&self) -> impl Iterator<Item = (Segment, u64)> {
        let mut offset = self.sector * 512;
        self.data.iter().map(move |&segment| {
            let start = offset;
            offset += u64::from(segment.len);
            (segment, start)
        })
    }
}

/// A queue's place in memory.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table: an offset in the memory under test.
    pub descriptors: u64,
    /// The available ring, likewise.
    pub avail: u64,
    /// The used ring, likewise.
    pub used: u64,
    /// Number of requests.
    pub requests: u16,
    headers: u64,
    statuses: Vec<u64>,
    // Unused descriptors; they are taken from the end.
    free: Vec<u16>,
}

impl Queue {
    /// Returns the offset of the available ring's index.
    pub fn avail_index(&self) -> u64 {
        self.avail + 2
    }

    /// Returns the offset of the used ring's index.
    pub fn used_index(&self) -> u64 {
        self.used + 2
    }

    /// Returns the offset of an element of the used ring.
    pub(crate) fn used_element(&self, index: u16) -> u64 {
        self.used + 4 + 8 * u64::from(index)
    }

    /// Returns the offset of the avail_event field after the used ring's elements, in which a
    /// device may name the request of which it wants to be notified.
    pub(crate) fn avail_event(&self) -> u64 {
        self.used_element(self.size)
    }
}

/// The queues, and the requests in them.
#[derive(Clone, Debug)]
pub struct Rings {
    queues: Vec<Queue>,
    requests: Vec<Request>,
    windows: Windows,
    pages: Vec<Range<u64>>,
}

/// Allocates whole pages of a window, in ascending order.
struct Pages {
    first: u64,
    next: u64,
    end: u64,
}

impl Pages {
    fn new(window: &Window) -> Self {
        let end = window.offset + window.bytes;
        let first = window.offset.max(RINGS_ADDRESS.min(end - UNIT_BYTES));
        Pages { first, next: first, end }
    }

    fn take(&mut self, bytes: u64) -> Option<u64> {
        let address = self.next;
        let next = address + bytes.next_multiple_of(PAGE);
        (next <= self.end).then(|| {
            self.next = next;
            address
        })
    }

    /// Takes the next data page of the image.
    fn take_data(&mut self, content: &Content) -> Option<u64> {
        let pages = self.next / PAGE..self.end / PAGE;
        let page = pages.into_iter().find(|&page| content.class(page) == Class::Data)?;
        self.next = (page + 1) * PAGE;
        Some(page * PAGE)
    }
}

/// Places the parts of queues, each in the window after that of the previous part.
struct Places {
    windows: Vec<Pages>,
    turn: usize,
}

impl Places {
    /// Takes pages from the next window that has room.
    fn take(&mut self, from: impl Fn(&mut Pages) -> Option<u64>) -> Option<u64> {
        let count = self.windows.len();
        let turn = self.turn;
        self.turn += 1;
        (turn..turn + count).find_map(|index| from(&mut self.windows[index % count]))
    }
}

impl Rings {
    /// Creates queues without requests.
    ///
    /// # Errors
    /// If memory has no room for them.
    pub(crate) fn new(
        content: &Content,
        windows: &Windows,
        seed: u64,
        queues: u16,
        size: u16,
    ) -> Result<Self, PlanError> {
        let pages = windows.list().iter().map(Pages::new).collect();
        let mut places = Places { windows: pages, turn: 0 };
        let most = u64::from(size / 3);
        let queues: Option<Vec<_>> = (0..queues)
            .map(|number| {
                let mut take = |bytes| places.take(|pages| pages.take(bytes));
                let descriptors = take(DESCRIPTOR_BYTES * u64::from(size))?;
                let avail = take(6 + 2 * u64::from(size))?;
                let used = take(6 + 8 * u64::from(size))?;
                let headers = take(HEADER_BYTES * most)?;
                let status_page = places.take(|pages| pages.take_data(content))?;
                // About every third byte, to detect a device that writes too much.
                let statuses = (status_page..)
                    .filter(|&address| content.read_u64(address) & 0xff != 0)
                    .step_by(3)
                    .take(to_usize(most))
                    .collect();
                let mut free: Vec<u16> = (0..size).collect();
                Random::new(seed, FOR_CHAINS, number.into()).shuffle(&mut free);
                let requests = 0;
                Some(Queue { size, descriptors, avail, used, requests, headers, statuses, free })
            })
            .collect();
        let queues = queues.ok_or_else(|| {
            let limit = "the rings of its disk need more";
            refuse("memory_bytes", windows.memory_bytes(), limit)
        })?;
        let used = places.windows.iter().map(|pages| pages.first / PAGE..pages.next / PAGE);
        let (pages, windows) = (used.collect(), windows.clone());
        Ok(Rings { queues, requests: Vec::new(), windows, pages })
    }

    /// Appends a request to a queue, which must have room.
    pub(crate) fn push(
        &mut self,
        number: u16,
        direction: Direction,
        sector: u64,
        data: Vec<Segment>,
    ) -> &Request {
        let queue = &mut self.queues[usize::from(number)];
        let index = queue.requests;
        queue.requests += 1;
        let chain = queue.free.split_off(queue.free.len() - (data.len() + 2));
        let header = queue.headers + HEADER_BYTES * u64::from(index);
        let status = queue.statuses[usize::from(index)];
        self.requests.push(Request {
            queue: number,
            index,
            chain,
            direction,
            sector,
            data,
            header,
            status,
        });
        &self.requests[self.requests.len() - 1]
    }

    /// Returns the queues.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Returns the requests, in the order of each queue.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Returns the pages reserved for the rings with their headers and status bytes.
    pub fn pages(&self) -> &[Range<u64>] {
        &self.pages
    }

    /// Returns the VMM's writes to guest memory before the guest starts: pairs of a guest physical
    /// address and the bytes to write.
    pub fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        let mut writes = self.fixed(|_| 0);
        for queue in &self.queues {
            // Flags and index, and the initial avail_event of a device that uses it.
            writes.push((queue.used, vec![0; 4]));
            writes.push((queue.avail_event(), vec![0; 2]));
        }
        for (address, _) in &mut writes {
            *address = self.windows.guest_address(*address);
        }
        writes
    }

    /// Returns the final content of everything except the used rings, by offset.
    pub(crate) fn final_bytes(&self) -> Vec<(u64, Vec<u8>)> {
        let mut bytes = self.fixed(|queue| queue.requests);
        bytes.extend(self.requests.iter().map(|request| (request.status, vec![0])));
        bytes.sort_unstable_by_key(|&(address, _)| address);
        bytes
    }

    /// Returns descriptors, available rings and headers.
    #[expect(clippy::cast_possible_truncation, reason = "flags, and the size of a header")]
    fn fixed(&self, avail_index: impl Fn(&Queue) -> u16) -> Vec<(u64, Vec<u8>)> {
        let mut tables: Vec<Vec<u8>> = Vec::new();
        let mut avails: Vec<Vec<u8>> = Vec::new();
        let mut headers: Vec<Vec<u8>> = Vec::new();
        for queue in &self.queues {
            tables.push(vec![0; usize::from(queue.size) * to_usize(DESCRIPTOR_BYTES)]);
            let mut avail = vec![0; usize::from(queue.size) * 2 + 6];
            avail[..2].copy_from_slice(&(VRING_AVAIL_F_NO_INTERRUPT as u16).to_le_bytes());
            avail[2..4].copy_from_slice(&avail_index(queue).to_le_bytes());
            // The used_event field: an index that is never reached.
            let end = avail.len();
            avail[end - 2..].fill(0xff);
            avails.push(avail);
            headers.push(Vec::with_capacity(usize::from(queue.requests) * to_usize(HEADER_BYTES)));
        }
        for request in &self.requests {
            let number = usize::from(request.queue);
            let (kind, data_flags) = match request.direction {
                Direction::Read => (VIRTIO_BLK_T_IN, VRING_DESC_F_WRITE),
                Direction::Write => (VIRTIO_BLK_T_OUT, 0),
            };
            headers[number].extend(u64::from(kind).to_le_bytes());
            headers[number].extend(request.sector.to_le_bytes());
            let entry = usize::from(request.index) * 2 + 4;
            avails[number][entry..entry + 2].copy_from_slice(&request.head().to_le_bytes());

            let header = (Segment { address: request.header, len: HEADER_BYTES as u32 }, 0);
            let data = request.data.iter().map(|&segment| (segment, data_flags));
            let status = (Segment { address: request.status, len: 1 }, VRING_DESC_F_WRITE);
            let all = std::iter::once(header).chain(data).chain([status]);
            for (i, (segment, flags)) in all.enumerate() {
                let next = request.chain.get(i + 1).copied();
                let flags = flags | next.map_or(0, |_| VRING_DESC_F_NEXT);
                let at = usize::from(request.chain[i]) * to_usize(DESCRIPTOR_BYTES);
                let descriptor = &mut tables[number][at..at + to_usize(DESCRIPTOR_BYTES)];
                let address = self.windows.guest_address(segment.address);
                descriptor[..8].copy_from_slice(&address.to_le_bytes());
                descriptor[8..12].copy_from_slice(&segment.len.to_le_bytes());
                descriptor[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
                descriptor[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
            }
        }
        let mut pieces = Vec::new();
        for (((queue, table), avail), headers) in
            self.queues.iter().zip(tables).zip(avails).zip(headers)
        {
            pieces.push((queue.descriptors, table));
            pieces.push((queue.avail, avail));
            if !headers.is_empty() {
                pieces.push((queue.headers, headers));
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Returns the number of windows that hold parts of queues.
    fn pages_in(rings: &Rings) -> usize {
        rings.pages().iter().filter(|pages| !pages.is_empty()).count()
    }

    #[test]
    fn parts_do_not_overlap_and_statuses_start_nonzero() {
        for (queues, size, vm) in [(1, 4, 64 << 20), (3, 64, 5 << 30), (8, 1024, 64 << 30)] {
            let content = Content::new(u64::from(size));
            let windows = Windows::new(64 << 20, vm).unwrap();
            let mut rings = Rings::new(&content, &windows, 1, queues, size).unwrap();
            for i in 0..queues * (size / 3) {
                let data = vec![Segment { address: 0, len: 512 }];
                rings.push(i % queues, Direction::Read, u64::from(i), data);
            }
            let mut seen = HashSet::new();
            let mut writes = rings.writes();
            for (address, bytes) in &mut writes {
                let offset = windows.offset_of(*address).unwrap();
                let last = windows.offset_of(*address + bytes.len() as u64 - 1).unwrap();
                assert_eq!(last - offset, bytes.len() as u64 - 1, "in one piece");
                *address = offset;
            }
            if windows.list().len() > 1 && queues > 1 {
                assert!(pages_in(&rings) == 4, "each window has parts of a queue");
            }
            for request in rings.requests() {
                assert_ne!(content.read_u64(request.status) & 0xff, 0);
                writes.push((request.status, vec![0]));
            }
            for queue in rings.queues() {
                assert_eq!(queue.requests, size / 3);
                let elements = usize::from(size) * 8;
                writes.push((queue.used_element(0), vec![0; elements]));
            }
            let pages = rings.pages();
            for (address, bytes) in writes {
                for byte in address..address + bytes.len() as u64 {
                    assert!(pages.iter().any(|p| p.contains(&(byte / PAGE))), "{byte:#x}");
                    assert!(seen.insert(byte), "{byte:#x}");
                }
            }
        }
    }

    #[test]
    fn chain_has_the_layout_of_virtio() {
        let content = Content::new(1);
        let windows = Windows::new(16 << 20, 5 << 30).unwrap();
        let mut rings = Rings::new(&content, &windows, 1, 1, 8).unwrap();
        // One of them above the hole.
        let high = (8 << 20) + 0x5000;
        let data = vec![Segment { address: high, len: 512 }, Segment { address: 0, len: 1024 }];
        let request = rings.push(0, Direction::Read, 7, data).clone();
        assert_eq!((request.bytes(), request.writable_bytes()), (1536, 1537));
        assert_eq!(request.pieces().map(|(_, at)| at).collect::<Vec<_>>(), [3584, 4096]);
        let gpa = |offset| windows.guest_address(offset);
        let writes = rings.writes();
        let table =
            &writes.iter().find(|(at, _)| *at == gpa(rings.queues()[0].descriptors)).unwrap().1;
        let expected = [
            (gpa(request.header), 16, 1, request.chain[1]),
            ((4 << 30) + 0x5000, 512, 3, request.chain[2]),
            (0, 1024, 3, request.chain[3]),
            (gpa(request.status), 1, 2, 0),
        ];
        for (&number, (address, len, flags, next)) in request.chain.iter().zip(expected) {
            let bytes = &table[usize::from(number) * 16..][..16];
            assert_eq!(bytes[..8], u64::to_le_bytes(address));
            assert_eq!(bytes[8..12], u32::to_le_bytes(len));
            assert_eq!(bytes[12..14], u16::to_le_bytes(flags));
            assert_eq!(bytes[14..], u16::to_le_bytes(next));
        }
        let header = &writes.iter().find(|(at, _)| *at == gpa(request.header)).unwrap().1;
        assert_eq!(header[..], [0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    }
}
