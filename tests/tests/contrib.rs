// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files for administrators in `contrib`: the host's tools accept them, and the programs know
//! the options that they use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use demand_tests::host::skip;
use demand_tests::process::{program, run};

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib").join(name)
}

const UNITS: [&str; 2] = ["demand-vmm@.service", "vhost-device-blk@.service"];

/// Returns the values of a unit's key.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

#[test]
fn programs_know_the_options_of_units() {
    for name in UNITS {
        let unit = fs::read_to_string(contrib("systemd").join(name)).unwrap();
        let [start] = values(&unit, "ExecStart")[..] else { panic!("{name}: one ExecStart") };
        let words: Vec<_> = start.split_whitespace().collect();
        let name = Path::new(words[0]).file_name().unwrap().to_str().unwrap();
        let mut command = Command::new(program(name).unwrap());
        command.args(words[1..].iter().filter(|word| **word == "run")).arg("--help");
        let help = run(&mut command, Duration::from_secs(60)).unwrap().stdout;
        let options: Vec<_> = words.iter().filter(|word| word.starts_with("--")).collect();
        assert!(options.len() >= 2, "{start}");
        for option in options {
            assert!(help.contains(&format!("{option} ")), "{name} has no {option}: {help}");
        }
        assert_eq!(values(&unit, "RestartPreventExitStatus"), ["2 3"]);
    }
}

/// The tool looks for the programs, which a test does not install.
#[test]
fn systemd_accepts_the_units() {
    let folder = tempfile::tempdir().unwrap();
    for name in UNITS {
        let unit = fs::read_to_string(contrib("systemd").join(name)).unwrap();
        let file = folder.path().join(name.replace('@', "@x"));
        fs::write(&file, unit.replace("=/usr/bin/", "=/bin/true ")).unwrap();
        let mut command = Command::new("systemd-analyze");
        // (A manual page is not installed either.)
        command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(&file);
        match run(&mut command, Duration::from_secs(60)) {
            Ok(output) => {
                assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
            }
            Err(error) => return skip(&format!("systemd-analyze does not run: {error:#}")),
        }
    }
}

#[test]
fn rule_gives_the_device_to_a_group() {
    let file = contrib("udev/70-demand-paging.rules");
    let text = fs::read_to_string(&file).unwrap();
    let rules: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let parts: Vec<_> = rules.iter().flat_map(|rule| rule.split(", ")).collect();
    assert_eq!(
        parts,
        ["SUBSYSTEM==\"misc\"", "KERNEL==\"userfaultfd\"", "GROUP=\"kvm\"", "MODE=\"0660\""]
    );
    // That is all of it; `udevadm verify`, which exists since systemd 254, may check it once more.
    let mut command = Command::new("udevadm");
    match run(command.arg("verify").arg(&file), Duration::from_secs(60)) {
        Ok(output) if output.stderr.contains("Unknown command verb") => {}
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => println!("udevadm does not run: {error:#}"),
    }
}
