// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that stops: with requests in flight, before a kick, and without a lost interrupt.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use demand_tests::driver::{Driver, READ, WRITE};
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use test_support::image;
use test_support::wait::until;

use crate::{DATA, MEMORY, Place, disk_of, memory, memory_of, service};

/// Requests that wait for pages, from an unavailable source.
#[test]
fn disk_with_requests_in_flight_is_not_stopped() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let (source, control) = image::far(MEMORY);
    let _guard = control.release_at_the_end();
    let held = DATA + (8 << 20);
    control.hold([held / 4096]);
    let memory = memory_of(Arc::new(source));
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    assert!(driver.submit(0, WRITE, 8, held, 4096));
    let error = device.quiesce(Duration::from_millis(200)).unwrap_err().to_string();
    for words in
        ["device blk0", "queue 0", "up to index 1", "answered up to 0", "retry when it is idle"]
    {
        assert!(error.contains(words), "{words}: {error}");
    }
    // Nothing was stopped.
    assert!(driver.submit(0, READ, 16, DATA, 512));
    until("another request is answered", || driver.reap(0) == 1);
    control.release();
    driver.finish();
    let bytes = fs::read(place.disk()).unwrap();
    assert_eq!(bytes[4096..4104], image::word_of(held).to_ne_bytes());
    assert_eq!(
        device.quiesce(Duration::from_secs(10)).unwrap().registers.queues()[0].next_available,
        2
    );
}

/// A paused vCPU may have made a request, but not kicked the device yet.
#[test]
fn disk_stops_between_request_and_kick() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    driver.request(READ, 8, DATA, 512);
    assert!(driver.leave(0, READ, 16, DATA + 4096, 512));
    let state = device.quiesce(Duration::from_secs(10)).unwrap();
    assert_eq!(state.registers.queues()[0].next_available, 2);
    driver.finish();
}

/// An interrupt may be lost between the stop of a back-end and the save of a guest: each is raised
/// once when the device resumes, even if the back-end has no answer.
#[test]
fn resumed_device_interrupts_once() {
    let place = Place::new();
    let back_end = place.back_end(1);
    let memory = memory(&place.image());
    let device = VhostUserDevice::connect(&disk_of(&back_end, 1), 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    driver.request(READ, 8, DATA, 512);
    device.quiesce(Duration::from_secs(10)).unwrap();
    for interrupt in device.interrupts() {
        let _ = interrupt.read();
        assert!(interrupt.read().is_err(), "nobody raises it while the device stands");
    }
    device.resume().unwrap();
    for interrupt in device.interrupts() {
        assert!(interrupt.read().is_ok(), "one may have been lost");
    }
}
