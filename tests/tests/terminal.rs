// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM on a terminal, as a user sees it: the guest's console, and progress bars.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::{Guarded, program, run};
use demand_tests::pseudo_terminal::PseudoTerminal;
use demand_vmm::api::client::Client;
use demand_vmm::report::Report;

/// Time limit for a guest to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// Ctrl-A, x.
const QUIT: &[u8] = b"\x01x";

fn vmm(words: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("demand-vmm")?);
    command.args(words);
    Ok(command)
}

fn boot(kernel: &Kernel, memory: &str, work: &str) -> Result<Command> {
    let mut command = vmm(&["run", "--memory", memory])?;
    command.arg("--kernel").arg(&kernel.image).arg("--initramfs").arg(&kernel.initramfs);
    command.arg("--cmdline").arg(format!("console=ttyS0 panic=-1 quiet work={work}"));
    Ok(command)
}

fn test(f: impl FnOnce(&Kernel, &Path) -> Result<()>) {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    f(&kernel, folder.path()).unwrap_or_else(|error| panic!("{error:#}"));
}

/// Including Ctrl-C, which would end the VMM on a terminal in line mode; one sequence is the VMM's,
/// and restores the terminal's mode.
#[test]
fn keys_are_the_guests() {
    test(|kernel, _| {
        let terminal = PseudoTerminal::new()?;
        let mut command = boot(kernel, "size=192M", "idle")?;
        terminal.attach(&mut command)?;
        ensure!(!terminal.is_raw()?, "the terminal is raw before there is a guest");
        let mut first = Guarded::spawn(&mut command)?;
        terminal.wait_shown("guest: ready")?;
        ensure!(terminal.is_raw()?, "keys do not go to the guest as they are typed");
        terminal.type_keys(b"\x03")?;
        terminal.type_keys(b"stop\n")?;
        terminal.wait_shown("guest: done")?;
        let status = first.wait(PATIENCE)?;
        ensure!(status.success() && !terminal.is_raw()?, "{status}: {}", terminal.shown());

        let terminal = PseudoTerminal::new()?;
        terminal.attach(&mut command)?;
        let mut second = Guarded::spawn(&mut command)?;
        terminal.wait_shown("guest: ready")?;
        terminal.type_keys(QUIT)?;
        let status = second.wait(PATIENCE)?;
        ensure!(status.success() && !terminal.is_raw()?, "{status}: {}", terminal.shown());
        Ok(())
    });
}

/// A snapshot draws a bar, and so does the arrival of a restored guest's memory, until the last
/// page is present.
#[test]
fn bars_say_how_far_it_is() {
    test(|kernel, folder| {
        let at = |name: &str| folder.join(name);
        let (socket, snapshot, report) = (at("api.sock"), at("snapshot"), at("report.json"));
        let serial = |name: &str| format!("file={}", at(name).display());
        let begin = |command: &mut Command, console: &str| {
            command.arg("--serial").arg(serial(console)).arg("--api-socket").arg(&socket);
            command.arg("--report").arg(&report);
        };
        let mut command = boot(kernel, "size=192M", "prove,journal=none,memory=64M")?;
        begin(&mut command, "first");
        let first = Guarded::spawn(&mut command)?;
        let works = |console: &str| {
            std::fs::read_to_string(at(console)).is_ok_and(|text| text.contains("guest: beat"))
        };
        test_support::wait::until("the guest works", || works("first"));

        let terminal = PseudoTerminal::new()?;
        let mut command = vmm(&["snapshot"])?;
        command.arg(&snapshot).arg("--api-socket").arg(&socket);
        terminal.attach(&mut command)?;
        let status = Guarded::spawn(&mut command)?.wait(PATIENCE)?;
        ensure!(status.success(), "{status}: {}", terminal.shown());
        let pages = 192 << 20 >> 12;
        ensure!(
            terminal.shown().contains(&format!(" of {pages} pages")),
            "a snapshot draws no bar: {:?}",
            terminal.shown()
        );
        drop(first);

        let terminal = PseudoTerminal::new()?;
        let mut command = vmm(&["restore", "--fill", "rate=64M", "--source"])?;
        begin(command.arg(&snapshot), "second");
        terminal.attach(&mut command)?;
        let mut second = Guarded::spawn(&mut command)?;
        terminal.wait_shown(&format!("/{pages} pages present"))?;
        ensure!(!terminal.is_raw()?, "the terminal is no console, and is raw");
        test_support::wait::until("the guest works again", || works("second"));
        let api = Client::new(&socket);
        let complete = || api.status().is_ok_and(|status| status.pages_present == pages);
        test_support::wait::until("all pages are present", complete);
        let output = run(vmm(&["shutdown", "--api-socket"])?.arg(&socket), PATIENCE)?;
        ensure!(output.status.success(), "{output:?}");
        let status = second.wait(PATIENCE)?;
        ensure!(status.success(), "{status}: {}", terminal.shown());
        let report: Report = serde_json::from_str(&std::fs::read_to_string(report)?)?;
        ensure!(
            report.time_to_complete_us > report.time_to_first_instruction_us,
            "the report does not say when the last page was there: {report:?}"
        );
        Ok(())
    });
}
