// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that requests a reset boots again, in the same VM.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use demand_tests::guest::{DiskOption, Guest, GuestConfig, Kernel};
use demand_vmm::api::{Go, State};
use guest_work::Work;

/// With the same devices; also in a restored guest whose memory is partly missing.
#[test]
fn a_reset_begins_anew() {
    let Some(kernel) = Kernel::lab() else { return };
    begins_anew(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
}

fn begins_anew(kernel: &Kernel) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::File::create(at("disk"))?.set_len(64 << 20)?;
    let mut config = GuestConfig {
        cpus: 2,
        memory: "size=192M".into(),
        disks: vec![DiskOption::new(at("disk"))],
        ..GuestConfig::default()
    };
    let mut guest = Guest::boot(&at("first"), kernel, &Work::Idle, &config)?;
    guest.wait_ready()?;
    guest.type_line("reset")?;
    assert_eq!(guest.wait_ready()?, 2);
    guest.snapshot(&at("snapshot"), Some(Go::Pause))?;
    guest.kill();
    config.memory = String::new();
    config.more = vec!["--fill".into(), "off".into()];
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &config)?;
    // The kernel comes from the snapshot, even if that is removed.
    let due = Instant::now() + Duration::from_secs(60);
    while guest.api().status().map_or(true, |status| status.state == State::Starting) {
        ensure!(Instant::now() < due, "it does not begin; {}", guest.story());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_dir_all(at("snapshot"))?;
    guest.type_line("reset")?;
    assert_eq!(guest.wait_ready()?, 2);
    guest.api().shutdown()?;
    guest.ended()?;
    Ok(())
}
