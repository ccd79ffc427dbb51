// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end that is stopped: the log names the request that it does not answer.

use std::sync::{Mutex, Once};
use std::thread;
use std::time::Duration;

use demand_tests::driver::Driver;
use demand_tests::process::Stopped;
use demand_vmm::virtio::request::Request;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use log::{LevelFilter, Log, Metadata, Record};
use test_support::wait::until;

use crate::{Place, disk_of, fill, memory, service};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps the lines of this process's log.
struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LINES.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn each_wait_for_a_back_end_is_named() {
    static LOG: Once = Once::new();
    LOG.call_once(|| {
        log::set_logger(&Lines).unwrap();
        log::set_max_level(LevelFilter::Warn);
    });
    let place = Place::new();
    let mut back_end = place.back_end(1);
    let socket = back_end.socket().display().to_string();
    let (memory, mut option) = (memory(&place.image()), disk_of(&back_end, 1));
    option.id = Some("silent".into());
    let device = VhostUserDevice::connect(&option, 0).unwrap();
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(&device, &memory, 1);
    driver.set_up();
    fill(&memory);
    let steps: [(Request, &str, &(dyn Fn() + Sync)); 3] = [
        (Request::Quiesce, "stop for a snapshot", &|| {
            device.quiesce(Duration::from_secs(20)).unwrap();
        }),
        (Request::Resume, "resume", &|| device.resume().unwrap()),
        (Request::EndPostcopy, "end post-copy", &|| device.end_postcopy().unwrap()),
    ];
    for (request, words, step) in steps {
        let stopped = Stopped::all_of(back_end.process().id()).unwrap();
        let line = format!("device silent: waiting for the back-end at {socket} to {words}");
        thread::scope(|scope| {
            let step = scope.spawn(step);
            until(words, || LINES.lock().unwrap().iter().any(|said| said.starts_with(&line)));
            assert_eq!(device.waits_for(), Some(request));
            drop(stopped);
            step.join().unwrap();
        });
        assert_eq!(device.waits_for(), None);
    }
}
