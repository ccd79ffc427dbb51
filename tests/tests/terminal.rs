// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM on a terminal, as a user sees it: the guest's console, and progress bars.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use demand_tests::host::{has_kvm, skip};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::{Guarded, console_waits, program, run};
use demand_tests::pseudo_terminal::PseudoTerminal;
use demand_tests::tiny_kernel::{PRINT, pvh_kernel};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::client::Client;
use demand_vmm::report::Report;
use test_support::wait::until;

/// Time limit for a guest to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time limit for an end, on a busy machine.
const SOON: Duration = Duration::from_secs(20);
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

/// Before the guest's first output, so even if the kernel is missing.
#[test]
fn console_names_the_keys_that_end_it() {
    const HINT: &str = "Ctrl-A x ends the VM";
    let shown = |level: &str| -> Result<String> {
        let terminal = PseudoTerminal::new()?;
        let words = ["run", "--memory=64M", "--kernel=/absent/kernel", "--log-level", level];
        let mut command = vmm(&words)?;
        terminal.attach(&mut command)?;
        let status = Guarded::spawn(&mut command)?.wait(PATIENCE)?;
        ensure!(!status.success() && !terminal.is_raw()?, "{status}: {}", terminal.shown());
        terminal.wait_shown("demand-vmm: cannot ")?;
        Ok(terminal.shown())
    };
    let warned = shown("warn").unwrap();
    assert_eq!(warned.matches(HINT).count(), 1, "{warned}");
    let quiet = shown("error").unwrap();
    assert!(!quiet.contains(HINT), "{quiet}");
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
        until("the guest works", || works("first"));

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
        terminal.wait_shown(&format!(" of {pages} pages present"))?;
        ensure!(!terminal.is_raw()?, "the terminal is no console, and is raw");
        until("the guest works again", || works("second"));
        let api = Client::new(&socket);
        let complete = || api.status().is_ok_and(|status| status.pages_present == pages);
        until("all pages are present", complete);
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

/// Waits until a guest of the terminal runs.
fn wait_raw(terminal: &PseudoTerminal) -> Result<()> {
    until("the console is the guest's", || terminal.is_raw().unwrap_or(false));
    Ok(())
}

/// Types Ctrl-C at a start that shows these words, before there is a guest.
fn interrupt(mut command: Command, words: &str) -> Result<()> {
    let terminal = PseudoTerminal::new()?;
    terminal.control(&mut command)?;
    let mut start = Guarded::spawn(&mut command)?;
    terminal.wait_shown(words)?;
    ensure!(!terminal.is_raw()?, "the terminal is raw before there is a guest");
    terminal.type_keys(b"\x03")?;
    let status = start.wait(SOON)?;
    let shown = terminal.shown();
    ensure!(status.success() && !shown.contains("demand-vmm: "), "{status}: {shown}");
    ensure!(!terminal.is_raw()?, "the terminal stays raw");
    Ok(())
}

#[test]
fn ctrl_c_ends_a_start() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(mut run) = printing(folder.path())? else { return Ok(()) };
    let silent = folder.path().join("silent");
    let _silent = UnixListener::bind(&silent)?;
    run.arg("--vhost-user").arg(format!("blk,socket={}", silent.display()));
    interrupt(run, "waiting for the back-end")
}

/// While its memory is read first, and a page cannot be read.
#[test]
fn ctrl_c_ends_a_restore() -> Result<()> {
    let Some(snapshot) = TinySnapshot::take(&[])? else { return Ok(()) };
    let page = snapshot.flip()?;
    let mut restore = snapshot.restore(&[])?;
    restore.args(["--lazy", "off"]);
    interrupt(restore, &format!("offset {page} of"))
}

/// The table follows on a line of its own, and the mode of the terminal is as before.
#[test]
fn table_follows_the_console() -> Result<()> {
    let Some((terminal, mut guest)) = printing_console()? else { return Ok(()) };
    terminal.type_keys(QUIT)?;
    let status = guest.wait(SOON)?;
    terminal.wait_shown(".\r\nrun: 64M of shmem, engine none, 1 vCPU\r\n")?;
    ensure!(status.success() && !terminal.is_raw()?, "{status}");
    Ok(())
}

/// An end in order would wait a second for the terminal, which shows nothing more.
#[test]
fn second_signal_restores_the_terminal() -> Result<()> {
    let Some((terminal, mut guest)) = printing_console()? else { return Ok(()) };
    terminal.suspend()?;
    until("the console waits", || console_waits(guest.id()));
    let id = libc::pid_t::try_from(guest.id())?;
    for (signal, pause) in [(libc::SIGINT, 0), (libc::SIGTERM, 300)] {
        // A signal that follows at once is the same request.
        thread::sleep(Duration::from_millis(pause));
        // SAFETY: the child has not been reaped, so its ID has not been reused.
        ensure!(unsafe { libc::kill(id, signal) } == 0, "it has ended");
    }
    let status = guest.wait(SOON)?;
    ensure!(status.code() == Some(128 + libc::SIGTERM), "{status}");
    ensure!(!terminal.is_raw()?, "the terminal stays raw");
    Ok(())
}

/// Starts a guest that prints without end, and waits until its console, a terminal of its own, is
/// raw and shows that; `None` if this machine has no KVM.
fn printing_console() -> Result<Option<(PseudoTerminal, Guarded)>> {
    // The kernel is not read again.
    let folder = tempfile::tempdir()?;
    let Some(mut command) = printing(folder.path())? else { return Ok(None) };
    let terminal = PseudoTerminal::new()?;
    terminal.control(&mut command)?;
    let guest = Guarded::spawn(&mut command)?;
    wait_raw(&terminal)?;
    terminal.wait_shown("...")?;
    Ok(Some((terminal, guest)))
}

/// Returns a run of a guest that prints without end; `None` if this machine has no KVM.
fn printing(folder: &Path) -> Result<Option<Command>> {
    if !has_kvm() {
        skip("there is no usable /dev/kvm");
        return Ok(None);
    }
    let kernel = folder.join("kernel");
    std::fs::write(&kernel, pvh_kernel(PRINT))?;
    let mut command = vmm(&["run", "--memory", "64M", "--kernel"])?;
    command.arg(kernel);
    Ok(Some(command))
}
