// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver of a disk behind virtio-mmio, like a guest's, in the tests' own process.
//!
//! It panics if the device breaks the specification.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use demand_memory::DemandMemory;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use test_support::wait::until;
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress};

/// A read (virtio 1.2, section 5.2.6).
pub const READ: u32 = 0;
/// A write.
pub const WRITE: u32 = 1;
/// A flush.
pub const FLUSH: u32 = 4;

/// Size of the rings and headers of each queue in bytes, from guest address 0 on.
const QUEUE_SPACE: u64 = 0x4000;
const SIZE: u16 = 64;
/// A request has three descriptors.
const SLOTS: u16 = SIZE / 3;

const OK: u8 = 0;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const EVENT_IDX: u64 = 1 << 29;

/// A queue as its driver sees it, which outlives the device.
#[derive(Clone, Debug)]
pub struct Ring {
    base: u64,
    next_avail: u16,
    /// Index in the used ring of the next answer to take.
    pub last_used: u16,
    /// Unanswered requests, by the place of their descriptors: kind, sector, guest address and
    /// length in bytes of the data.
    pub pending: HashMap<u16, (u32, u64, u64, u32)>,
}

impl Ring {
    fn new(index: u64) -> Self {
        Ring { base: QUEUE_SPACE * index, next_avail: 0, last_used: 0, pending: HashMap::new() }
    }
    fn available(&self) -> u64 {
        self.base + 0x1000
    }
    fn used(&self) -> u64 {
        self.base + 0x2000
    }
    fn header(&self, slot: u16) -> u64 {
        self.base + 0x3000 + 32 * u64::from(slot)
    }
}

/// A guest's driver of a disk.
#[derive(Debug)]
pub struct Driver<'a> {
    device: &'a VhostUserDevice,
    memory: &'a DemandMemory,
    /// Its queues.
    pub rings: Vec<Ring>,
}

impl<'a> Driver<'a> {
    /// Creates a driver that will use `queues` queues.
    pub fn new(device: &'a VhostUserDevice, memory: &'a DemandMemory, queues: u64) -> Self {
        Driver { device, memory, rings: (0..queues).map(Ring::new).collect() }
    }

    /// Reads the register at `offset` (bytes).
    pub fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(MmioAddress(0), offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes the register at `offset` (bytes).
    pub fn set(&self, offset: u64, value: u32) {
        self.device.mmio_write(MmioAddress(0), offset, &value.to_le_bytes());
    }

    /// Reads the configuration at `offset` (bytes).
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.mmio_read(MmioAddress(0), 0x100 + offset, &mut data);
        data
    }

    /// Writes to memory.
    ///
    /// # Panics
    ///
    /// If there is no memory at the address.
    pub fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Sets the device up from reset to ready, as in virtio 1.2, section 3.1.1.
    ///
    /// # Panics
    ///
    /// If the device is not a virtio disk.
    pub fn set_up(&mut self) {
        self.prepare();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            *ring = Ring::new(index as u64);
        }
        for index in 0..self.rings.len() {
            let ring = &self.rings[index];
            self.memory.write_slice(&[0; QUEUE_SPACE as usize], GuestAddress(ring.base)).unwrap();
            self.set_up_queue(index, ring.base);
        }
        self.set(0x70, 3 | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.get(0x70), 3 | FEATURES_OK | DRIVER_OK, "the device runs");
    }

    /// Sets the device up from reset to the end of feature negotiation.
    ///
    /// # Panics
    ///
    /// If the device is not a virtio disk.
    pub fn prepare(&self) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0);
        assert_eq!((self.get(0), self.get(4), self.get(8)), (0x7472_6976, 2, 2));
        self.set(0x70, 3);
        for half in [0, 1] {
            self.set(0x14, half);
            let offered = self.get(0x10);
            self.set(0x24, half);
            // The driver of these tests polls, and kicks for each request.
            self.set(0x20, if half == 0 { offered & !(EVENT_IDX as u32) } else { offered });
        }
        self.set(0x70, 3 | FEATURES_OK);
        assert_eq!(self.get(0x70), 3 | FEATURES_OK);
    }

    /// Places a queue's rings at guest address `base`.
    ///
    /// # Panics
    ///
    /// If the device is not a virtio disk.
    pub fn set_up_queue(&self, index: usize, base: u64) {
        self.set(0x30, index as u32);
        assert_eq!((self.get(0x44), self.get(0x34)), (0, 256));
        self.set(0x38, SIZE.into());
        for (offset, ring) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            let address = base.wrapping_add(ring);
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    /// Puts a request in the queue; returns false if it is full.
    ///
    /// # Panics
    ///
    /// If there is no memory for its rings.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: u64, len: u32) -> bool {
        let room = self.leave(queue, kind, sector, data, len);
        if room {
            self.set(0x50, queue as u32);
        }
        room
    }

    /// Puts a request in the queue without kicking the device; returns false if it is full.
    ///
    /// # Panics
    ///
    /// If there is no memory for its rings.
    pub fn leave(&mut self, queue: usize, kind: u32, sector: u64, data: u64, len: u32) -> bool {
        let ring = &self.rings[queue];
        let Some(slot) = (0..SLOTS).find(|slot| !ring.pending.contains_key(slot)) else {
            return false;
        };
        let (header, head) = (ring.header(slot), 3 * slot);
        self.put(header, u64::from(kind));
        self.put(header + 8, sector);
        self.put(header + 16, 0xffu8);
        let to_driver = if kind == READ { 2u16 } else { 0 };
        let chain = [(header, 16, 1), (data, len, 1 | to_driver), (header + 16, 1, 2)];
        // A flush has no data.
        let chain = if len == 0 { vec![chain[0], chain[2]] } else { chain.to_vec() };
        for (index, (address, len, flags)) in (head..).zip(chain) {
            let at = self.rings[queue].base + 16 * u64::from(index);
            self.put(at, address);
            self.put(at + 8, len);
            self.put(at + 12, flags);
            self.put(at + 14, index + 1);
        }
        let ring = &self.rings[queue];
        let place = u64::from(ring.next_avail % SIZE);
        self.put(ring.available() + 4 + 2 * place, head);
        let next = ring.next_avail.wrapping_add(1);
        let index = GuestAddress(ring.available() + 2);
        self.memory.store(next, index, Ordering::Release).unwrap();
        let ring = &mut self.rings[queue];
        ring.next_avail = next;
        ring.pending.insert(slot, (kind, sector, data, len));
        true
    }

    /// Takes the device's answers, each of which must belong to a pending request. Returns their
    /// number.
    ///
    /// # Panics
    ///
    /// If it does not, or the request has failed.
    pub fn reap(&mut self, queue: usize) -> usize {
        let ring = &mut self.rings[queue];
        let index = GuestAddress(ring.used() + 2);
        let used: u16 = self.memory.load(index, Ordering::Acquire).unwrap();
        let mut count = 0;
        while ring.last_used != used {
            let at = ring.used() + 4 + 8 * u64::from(ring.last_used % SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let slot = (head / 3) as u16;
            let request = ring.pending.remove(&slot);
            assert!(head.is_multiple_of(3) && request.is_some(), "{head} was not asked, or twice");
            let status = GuestAddress(ring.header(slot) + 16);
            assert_eq!(self.memory.read_obj::<u8>(status).unwrap(), OK, "{request:?}");
            ring.last_used = ring.last_used.wrapping_add(1);
            count += 1;
        }
        count
    }

    /// Waits for all answers.
    ///
    /// # Panics
    ///
    /// If they do not arrive.
    pub fn finish(&mut self) {
        for queue in 0..self.rings.len() {
            until("all requests are answered", || {
                self.reap(queue);
                self.rings[queue].pending.is_empty()
            });
        }
    }

    /// Submits a request on the first queue and waits for its answer.
    ///
    /// # Panics
    ///
    /// If no answer arrives.
    pub fn request(&mut self, kind: u32, sector: u64, data: u64, len: u32) {
        assert!(self.submit(0, kind, sector, data, len));
        self.finish();
    }

    /// Reads a word of memory.
    ///
    /// # Panics
    ///
    /// If there is no memory at the address.
    pub fn word(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}
