// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that uses the disk, and drivers with wrong rings or features.

use std::fs;
use std::time::Duration;

use demand_tests::driver::{Driver, WRITE};
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::virtio::state::DeviceState;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use test_support::wait::until;
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

use crate::{DATA, DISK_SECTORS, MEMORY, Place, disk_of, fill, memory, service, use_disk};

const NEEDS_RESET: u32 = 64;

#[test]
fn driver_uses_disk_and_sets_up_again() {
    let place = Place::new();
    let back_end = place.back_end(2);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 2), 3).unwrap();
    assert_eq!((device.name(), device.kind()), ("blk3", DeviceKind::Blk));
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 2);
    driver.set_up();
    assert_eq!(driver.config::<8>(0), DISK_SECTORS.to_le_bytes());
    assert_eq!(driver.config::<2>(34), 2u16.to_le_bytes());
    assert_eq!(driver.get(0x60), 1, "interrupts are always about queues");
    for round in 1..=3 {
        use_disk(&mut driver, &place.disk(), 8 * round, 0x1111 * round);
        // The back-end writes missing pages to the disk.
        assert!(driver.submit(1, WRITE, 2000, DATA + 0x10_0000 * round, 8192));
        driver.finish();
        let written = fs::read(place.disk()).unwrap()[2000 * 512..][..8].to_vec();
        let page = (DATA + 0x10_0000 * round) / 4096;
        assert_eq!(written, (page | 0xabcd << 48).to_le_bytes());
        // The driver can write the state of the write cache, and nothing else.
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[0]);
        device.mmio_write(MmioAddress(0), 0x100, &[0; 8]);
        assert_eq!((driver.config::<1>(32), driver.config::<2>(0)), ([0], [0, 128]));
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[1]);
        driver.set_up();
    }
    let interrupt = device.interrupts().next().unwrap();
    assert!(interrupt.read().is_ok(), "the back-end has raised it");
    fill(&memory);
    device.end_postcopy().unwrap();
    use_disk(&mut driver, &place.disk(), 999, 0x5555);
    device.check_alive().unwrap();
    back_end.terminate().unwrap();
    until("its end is seen", || device.check_alive().is_err());
    let error = device.can_snapshot().unwrap_err().to_string();
    assert!(error.starts_with("device blk3: ") && error.contains("closed the connection"));
}

#[test]
fn driver_with_wrong_rings_is_asked_to_reset() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.prepare();
    driver.set_up_queue(0, 0);
    driver.set(0x70, 15);
    assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "no memory was shared yet");
    device.share_memory(&memory, &service()).unwrap();
    // Past the end, across the end, unaligned, and where addresses wrap around.
    for base in [MEMORY, MEMORY - 0x1004, 0x1001, u64::MAX - 0xfff] {
        driver.prepare();
        driver.set_up_queue(0, base);
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "{base:#x}");
        assert_eq!(driver.get(0x60) & 2, 2, "it is told");
        driver.set(0x64, 2);
        assert_eq!(driver.get(0x60) & 2, 0);
    }
    driver.prepare();
    driver.set(0x38, 512);
    driver.set(0x44, 1);
    driver.set(0x70, 15);
    assert_eq!(driver.get(0x70), 15 | NEEDS_RESET, "a queue of no size");
    // A driver that has set FAILED can use the device again.
    driver.prepare();
    driver.set(0x70, 128);
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 5, 7);
}

/// DRIVER_OK without negotiated features, with each feature that the back-end offers and the device
/// does not, and with features that the driver withdraws at the last moment.
#[test]
fn driver_ok_needs_agreed_features() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    let offered = |driver: &Driver<'_>| {
        [0, 1].map(|half| {
            driver.set(0x14, half);
            driver.get(0x10)
        })
    };
    let accept = |driver: &Driver<'_>, [low, high]: [u32; 2]| {
        for (half, bits) in [(0, low), (1, high)] {
            driver.set(0x24, half);
            driver.set(0x20, bits);
        }
    };
    let refused = |driver: &Driver<'_>, what: &str| {
        assert_eq!(driver.get(0x70) & NEEDS_RESET, NEEDS_RESET, "{what}");
        assert_eq!(driver.get(0x60) & 2, 2, "it is told: {what}");
        let kick = device.interrupts().last().unwrap();
        assert!(kick.read().is_ok(), "it is interrupted: {what}");
        // The back-end was given no queue.
        driver.set(0x50, 0);
        assert_eq!(driver.word(0x2000), 0, "no request is answered: {what}");
    };
    // Nothing negotiated, and then features that must not be: LOG_ALL, PROTOCOL_FEATURES,
    // ACCESS_PLATFORM, packed rings, legacy.
    let log_and_protocol = 1 << 26 | 1 << 30;
    for (what, agree, low, high) in [
        ("FEATURES_OK was never set", 0, 0, 1),
        ("a feature below was not offered", 8, log_and_protocol, 1),
        ("a feature above was not offered", 8, 0, 1 | 1 << 1 | 1 << 2),
        ("a legacy driver", 8, 0, 0),
    ] {
        driver.set(0x70, 0);
        driver.set(0x70, 3);
        accept(&driver, [low, high]);
        driver.set(0x70, 3 | agree);
        assert_eq!(driver.get(0x70), 3, "{what}");
        // The write cache depends on a feature that was not negotiated.
        device.mmio_write(MmioAddress(0), 0x100 + 32, &[0]);
        assert_eq!(driver.config::<1>(32), [1], "{what}");
        driver.set_up_queue(0, 0);
        driver.set(0x70, 3 | agree | 4);
        refused(&driver, what);
        // Too late.
        accept(&driver, offered(&driver));
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70) & NEEDS_RESET, NEEDS_RESET, "{what}");
    }
    driver.set_up();
    use_disk(&mut driver, &place.disk(), 5, 7);
    let agreed = device.quiesce(Duration::from_secs(10)).unwrap();
    drop((device, back_end));

    // An altered state: its features were not offered, or not negotiated.
    let text = serde_json::to_value(&agreed).unwrap();
    for (what, field, value) in [
        ("LOG_ALL", "driver_features", agreed.registers.driver_features() | 1 << 26),
        ("no VERSION_1", "driver_features", agreed.registers.driver_features() & !(1 << 32)),
        ("not agreed", "status", 7),
    ] {
        let mut altered = text.clone();
        altered["registers"][field] = value.into();
        let state: DeviceState = serde_json::from_value(altered).unwrap();
        let back_end = place.back_end(1);
        let error = VhostUserDevice::restore(&disk_of(&back_end, 1), 0, &state).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{what}: {error}");
    }
}
