// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of a virtio-mmio device (virtio 1.2, section 4.2.2), version 2.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;

use crate::config::device_kind::MAX_QUEUE_SIZE;
use crate::virtio::error::RingError;
use crate::virtio::request::Request;

/// Offset of the register for the number of a queue with new buffers, in bytes from the start of
/// the window.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Offset of the status register, in bytes; writing 0 resets the device.
pub const STATUS: u64 = VIRTIO_MMIO_STATUS as u64;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// The vendor of the transport, which drivers ignore.
const VENDOR: u32 = u32::from_le_bytes(*b"dmnd");
/// A register of later versions, which reads as zero because queues cannot be reset.
const QUEUE_RESET: u32 = 0xc0;
/// The length and address of a shared memory region that does not exist.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// A queue, as the driver has set it up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// Whether the driver has finished setting it up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Index in the available ring of the first request that the device has not taken. It is valid
    /// only while the queue is stopped.
    pub next_available: u16,
}

impl QueueState {
    /// Checks the size and the addresses by themselves (virtio 1.2, section 2.7). Returns the
    /// rings' addresses and lengths, in bytes.
    pub(crate) fn extents(&self) -> Result<[(u64, u64); 3], RingError> {
        if !self.size.is_power_of_two() || self.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size { size: self.size });
        }
        let size = u64::from(self.size);
        let rings = [
            ("descriptor table", self.descriptors, 16 * size, 16),
            ("available ring", self.available, 6 + 2 * size, 2),
            ("used ring", self.used, 6 + 8 * size, 4),
        ];
        for (ring, address, _, alignment) in rings {
            if !address.is_multiple_of(alignment) {
                return Err(RingError::Alignment { ring, address, alignment });
            }
        }
        Ok(rings.map(|(_, address, len, _)| (address, len)))
    }
}

/// The effect of a register write on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Action {
    /// No effect.
    None,
    /// The driver is ready: the queues that are ready start, if features were agreed on.
    Start,
    /// The driver resets the device. The registers have been reset.
    Reset,
    /// The driver has given up on the device.
    Fail,
    /// The driver stops a queue.
    StopQueue(usize),
    /// The driver announces new requests.
    Notify,
    /// The driver writes to the config space, at this offset in bytes.
    WriteConfig(usize, Vec<u8>),
}

impl Action {
    /// Returns the request to the back-end that the access waits for.
    pub(crate) fn asks_back_end(&self) -> Option<Request> {
        match self {
            Action::None | Action::Notify => None,
            Action::Start => Some(Request::Start),
            Action::Reset | Action::Fail => Some(Request::Stop),
            Action::StopQueue(_) => Some(Request::StopQueue),
            Action::WriteConfig(..) => Some(Request::WriteConfig),
        }
    }
}

/// The registers and their values. A snapshot keeps all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    device_id: u32,
    /// The features that the device offers.
    features: u64,
    /// The features that the driver has accepted.
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u32,
    /// Whether the driver has a changed config space to read.
    config_changed: bool,
    config_generation: u32,
    queue_size_max: u16,
    queues: Vec<QueueState>,
    config: Vec<u8>,
}

impl Registers {
    /// Creates the registers of a device in its reset state, from virtio's number of its type, the
    /// offered features, the number and the largest size (in descriptors) of its queues, and the
    /// config space.
    pub(crate) fn new(
        device_id: u32,
        features: u64,
        queues: usize,
        queue_size_max: u16,
        config: Vec<u8>,
    ) -> Self {
        Registers {
            device_id,
            features,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            status: 0,
            config_changed: false,
            config_generation: 0,
            queue_size_max,
            queues: vec![QueueState::default(); queues],
            config,
        }
    }

    /// Returns virtio's number of the device's type.
    pub fn device_id(&self) -> u32 {
        self.device_id
    }

    /// Returns the features that the driver and the device have agreed on: none before
    /// `FEATURES_OK`, and never one that was not offered.
    pub fn driver_features(&self) -> u64 {
        if self.has_agreed() { self.driver_features & self.features } else { 0 }
    }

    /// Returns the queues.
    pub fn queues(&self) -> &[QueueState] {
        &self.queues
    }

    /// Returns the largest size of a queue, in descriptors.
    pub fn queue_size_max(&self) -> u16 {
        self.queue_size_max
    }

    /// Returns the config space, as the driver sees it.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Whether the device runs: the driver has agreed on features and set `DRIVER_OK`, and the
    /// device has neither failed nor needs a reset.
    pub fn is_live(&self) -> bool {
        self.is_started() && self.has_agreed()
    }

    /// Whether the driver has set `DRIVER_OK`, even without agreed features, on a device that has
    /// neither failed nor needs a reset.
    fn is_started(&self) -> bool {
        let bad = VIRTIO_CONFIG_S_FAILED | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & bad == 0
    }

    /// Whether a driver can have caused this combination of status and accepted features.
    pub(crate) fn is_coherent(&self) -> bool {
        if self.has_agreed() { self.features_are_acceptable() } else { !self.is_started() }
    }

    /// Whether the driver has agreed on features.
    pub(crate) fn has_agreed(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0
    }

    pub(crate) fn queue_mut(&mut self, queue: usize) -> &mut QueueState {
        &mut self.queues[queue]
    }

    /// Replaces the offered features. Agreed features stay.
    pub(crate) fn offer(&mut self, features: u64) {
        self.features = features;
    }

    /// Marks the device as unusable until it is reset. Returns whether the driver must be notified.
    pub(crate) fn need_reset(&mut self) -> bool {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.config_changed = true;
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// Replaces the config space, and makes the driver read it.
    pub(crate) fn change_config(&mut self, config: Vec<u8>) {
        self.set_config(config);
        self.config_generation = self.config_generation.wrapping_add(1);
        self.config_changed = true;
    }

    /// Replaces the config space with one that the driver has written, or will read again by
    /// itself.
    pub(crate) fn set_config(&mut self, config: Vec<u8>) {
        self.config = config;
    }

    /// Serves a read at `offset`, in bytes. Absent registers read as zeros.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let rest = usize::try_from(at).ok().and_then(|at| self.config.get(at..));
            for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
                *to = *from;
            }
        } else if let (4, Ok(offset)) = (data.len(), u32::try_from(offset)) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            log::debug!("a driver reads {} bytes of a register at {offset:#x}", data.len());
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => low(self.features),
                1 => low(self.features >> 32),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX if queue.is_some() => u32::from(self.queue_size_max),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => {
                // Interrupts pass from the back-end to KVM, so their status is unknown here. With
                // this answer the driver checks all queues, which is always correct.
                let running = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
                let queues = if running { VIRTIO_MMIO_INT_VRING } else { 0 };
                queues | if self.config_changed { VIRTIO_MMIO_INT_CONFIG } else { 0 }
            }
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    /// Serves a write at `offset`, in bytes, and returns its effect on the device.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let Some(at) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            return Action::WriteConfig(usize::try_from(at).unwrap_or(usize::MAX), data.to_vec());
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            log::debug!("a driver writes {} bytes to a register at {offset:#x}", data.len());
            return Action::None;
        };
        let offset = low(offset);
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if !self.has_agreed() => {
                match self.driver_features_select {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    // The device offers no feature in the upper words.
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return Action::Notify,
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.config_changed &= value & VIRTIO_MMIO_INT_CONFIG == 0;
            }
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_QUEUE_READY => return self.write_queue_ready(value),
            QUEUE_RESET | VIRTIO_MMIO_SHM_SEL => {}
            _ => self.write_queue(offset, value),
        }
        Action::None
    }

    fn write_status(&mut self, value: u32) -> Action {
        if value == 0 {
            let queues = vec![QueueState::default(); self.queues.len()];
            *self = Registers {
                driver_features: 0,
                device_features_select: 0,
                driver_features_select: 0,
                queue_select: 0,
                status: 0,
                config_changed: false,
                queues,
                config: std::mem::take(&mut self.config),
                ..*self
            };
            return Action::Reset;
        }
        // Only a reset clears bits, and only the device sets the bit for a needed reset.
        let new = value & !self.status & !VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status |= new;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_acceptable() {
            self.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_FAILED != 0 {
            return Action::Fail;
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.is_started() {
            return Action::Start;
        }
        Action::None
    }

    fn features_are_acceptable(&self) -> bool {
        let modern = 1 << VIRTIO_F_VERSION_1;
        self.driver_features & !self.features == 0 && self.driver_features & modern != 0
    }

    fn write_queue_ready(&mut self, value: u32) -> Action {
        let index = self.queue_select as usize;
        let live = self.is_live();
        let Some(queue) = self.queues.get_mut(index) else { return Action::None };
        match (value, queue.ready) {
            (0, true) => {
                queue.ready = false;
                return if live { Action::StopQueue(index) } else { Action::None };
            }
            // Queues are set up before DRIVER_OK (section 3.1.1).
            (1, false) if !live => {
                queue.ready = true;
                queue.next_available = 0;
            }
            _ => {}
        }
        Action::None
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if queue.ready {
            return;
        }
        match offset {
            // A size that is too large is stored as 0, and refused when the device starts.
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).ok().filter(|size| *size <= self.queue_size_max);
                queue.size = size.unwrap_or(0);
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => log::debug!("a driver writes to an unknown register at {offset:#x}"),
        }
    }
}

/// Returns the lower half of a word.
#[expect(clippy::cast_possible_truncation, reason = "the upper half is what must go")]
fn low(word: u64) -> u32 {
    word as u32
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << 29 | 1 << 9;

    fn registers() -> Registers {
        Registers::new(2, FEATURES, 2, 256, vec![1, 2, 3, 4, 5, 6, 7, 8, 9])
    }

    fn read(registers: &Registers, offset: u32) -> u32 {
        let mut data = [0; 4];
        registers.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(registers: &mut Registers, offset: u32, value: u32) -> Action {
        registers.write(offset.into(), &value.to_le_bytes())
    }

    #[track_caller]
    fn set(registers: &mut Registers, offset: u32, value: u32) {
        assert_eq!(write(registers, offset, value), Action::None);
    }

    fn accept(registers: &mut Registers, features: u64) -> bool {
        for (select, half) in [(0, low(features)), (1, low(features >> 32))] {
            set(registers, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            set(registers, VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        set(registers, VIRTIO_MMIO_STATUS, 3 | VIRTIO_CONFIG_S_FEATURES_OK);
        read(registers, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK != 0
    }

    #[test]
    fn a_driver_finds_the_device() {
        let mut registers = registers();
        assert_eq!(read(&registers, VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!(read(&registers, VIRTIO_MMIO_VERSION), 2);
        assert_eq!(read(&registers, VIRTIO_MMIO_DEVICE_ID), 2);
        assert_eq!(read(&registers, VIRTIO_MMIO_DEVICE_FEATURES), 1 << 29 | 1 << 9);
        set(&mut registers, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(read(&registers, VIRTIO_MMIO_DEVICE_FEATURES), 1);
        set(&mut registers, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(read(&registers, VIRTIO_MMIO_DEVICE_FEATURES), 0);
        assert_eq!(read(&registers, VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
        set(&mut registers, VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(read(&registers, VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there are two queues");
        assert_eq!(read(&registers, VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
        assert_eq!(read(&registers, VIRTIO_MMIO_QUEUE_DESC_LOW), 0);
    }

    #[test]
    fn features_are_agreed_on_or_not() {
        assert!(accept(&mut registers(), FEATURES));
        assert!(accept(&mut registers(), 1 << VIRTIO_F_VERSION_1));
        assert!(!accept(&mut registers(), 1 << 29), "legacy drivers are not served");
        assert!(!accept(&mut registers(), FEATURES | 1 << 28), "that was not offered");
        // Agreed features do not change.
        let mut agreed = registers();
        assert!(accept(&mut agreed, FEATURES));
        set(&mut agreed, VIRTIO_MMIO_DRIVER_FEATURES, 0);
        assert_eq!(agreed.driver_features, FEATURES);
    }

    #[test]
    fn only_agreed_features_count() {
        let mut registers = registers();
        set(&mut registers, VIRTIO_MMIO_DRIVER_FEATURES, 1 << 9 | 1 << 26);
        assert!(registers.is_coherent());
        assert_eq!(registers.driver_features(), 0, "not before FEATURES_OK");
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 7), Action::Start);
        assert!(!registers.is_live() && !registers.is_coherent());
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 0), Action::Reset);
        assert!(accept(&mut registers, FEATURES));
        assert!(registers.is_coherent());
        assert_eq!(registers.driver_features(), FEATURES);
        registers.driver_features |= 1 << 26;
        assert!(!registers.is_coherent());
        assert_eq!(registers.driver_features(), FEATURES, "that was not offered");
    }

    #[test]
    fn queues_are_set_up_started_and_stopped() {
        let mut registers = registers();
        assert!(accept(&mut registers, FEATURES));
        set(&mut registers, VIRTIO_MMIO_QUEUE_SEL, 1);
        set(&mut registers, VIRTIO_MMIO_QUEUE_NUM, 64);
        for (offset, value) in [(0x80, 0x1000), (0x84, 1), (0x90, 0x2000), (0xa0, 0x3000)] {
            set(&mut registers, offset, value);
        }
        set(&mut registers, VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(read(&registers, VIRTIO_MMIO_QUEUE_READY), 1);
        // A queue that is ready does not change.
        set(&mut registers, VIRTIO_MMIO_QUEUE_NUM, 8);
        let queue = &registers.queues[1];
        assert_eq!((queue.size, queue.descriptors, queue.used), (64, 0x1_0000_1000, 0x3000));
        assert_eq!(read(&registers, VIRTIO_MMIO_INTERRUPT_STATUS), 0);

        let status = 7 | VIRTIO_CONFIG_S_FEATURES_OK;
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, status), Action::Start);
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, status), Action::None, "once");
        assert_eq!(read(&registers, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        set(&mut registers, VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(read(&registers, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        assert_eq!(write(&mut registers, VIRTIO_MMIO_QUEUE_NOTIFY, 1), Action::Notify);
        let stopped = write(&mut registers, VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(stopped, Action::StopQueue(1));

        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 0), Action::Reset);
        assert_eq!(registers, super::tests::registers(), "as it was at first");
    }

    #[test]
    fn device_reports_a_needed_reset() {
        let mut registers = registers();
        assert!(accept(&mut registers, FEATURES));
        assert!(!registers.need_reset(), "nobody listens yet");
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 15), Action::None, "it is too late");
        assert!(!registers.is_live());
        assert_eq!(read(&registers, VIRTIO_MMIO_STATUS), 15 | VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 15 | 128), Action::Fail);
        assert_eq!(write(&mut registers, VIRTIO_MMIO_STATUS, 0), Action::Reset);
        assert_eq!(read(&registers, VIRTIO_MMIO_STATUS), 0);
    }

    #[test]
    fn the_configuration_is_read_by_bytes_and_changes() {
        let mut registers = registers();
        let mut data = [0xff; 8];
        registers.read(0x101, &mut data[..2]);
        assert_eq!(data[..2], [2, 3]);
        registers.read(0x107, &mut data);
        assert_eq!(data, [8, 9, 0, 0, 0, 0, 0, 0]);
        registers.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
        let written = registers.write(0x102, &[7]);
        assert_eq!(written, Action::WriteConfig(2, vec![7]));
        let before = read(&registers, VIRTIO_MMIO_CONFIG_GENERATION);
        registers.change_config(vec![42]);
        assert_ne!(read(&registers, VIRTIO_MMIO_CONFIG_GENERATION), before);
        assert_eq!(read(&registers, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        set(&mut registers, VIRTIO_MMIO_INTERRUPT_ACK, 2);
        assert_eq!(read(&registers, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        // Registers have four bytes.
        let mut half = [0xff; 2];
        registers.read(0, &mut half);
        assert_eq!(half, [0, 0]);
        assert_eq!(registers.write(0x70, &[0; 8]), Action::None);
    }

    #[test]
    fn rings_have_sizes_and_alignments() {
        let good = QueueState {
            size: 8,
            ready: true,
            descriptors: 0x1000,
            available: 0x1082,
            used: 0x10a4,
            next_available: 0,
        };
        assert_eq!(good.extents(), Ok([(0x1000, 128), (0x1082, 22), (0x10a4, 70)]));
        for bad in [
            QueueState { size: 0, ..good.clone() },
            QueueState { size: 12, ..good.clone() },
            QueueState { descriptors: 8, ..good.clone() },
            QueueState { available: 1, ..good.clone() },
            QueueState { used: 2, ..good.clone() },
        ] {
            assert!(bad.extents().is_err(), "{bad:?}");
        }
        let mut registers = registers();
        set(&mut registers, VIRTIO_MMIO_QUEUE_NUM, 512);
        assert_eq!(registers.queues[0].size, 0, "larger than it may be");
    }
}
