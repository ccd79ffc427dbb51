// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The comparison of memory and disk with their expected content, in a separate process.

use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use demand_vmm::error::Error;
use demand_vmm::logger;
use demand_vmm::vm::interrupt::Interrupt;
use demand_vmm::vm::machine::Machine;
use test_guest::plan::Plan;

use crate::run_options::RunOptions;

/// Runs a separate process that compares memory and disk with their expected content. With
/// `untouched`, the process also checks that memory outside the test was left alone.
pub(crate) fn verify(
    options: &RunOptions,
    machine: &Machine,
    plan: &Plan,
    untouched: bool,
    interrupt: &Interrupt,
) -> Result<bool, Error> {
    let refused = |error: std::io::Error| {
        Error::failed(format!("cannot run demand-verify: {error}; build it beside this program"))
    };
    let mut params = tempfile::NamedTempFile::new().map_err(refused)?;
    serde_json::to_writer(&mut params, plan.params())
        .map_err(|error| Error::failed(format!("cannot write the plan's parameters: {error}")))?;
    let program = std::env::current_exe().map_err(refused)?.with_file_name("demand-verify");
    let mut command = Command::new(program);
    command.arg("--params").arg(params.path());
    for pager in machine.pagers() {
        let Some(file) = pager.backing().file() else {
            let why = "cannot verify: this memory has no file that another process could read";
            return Err(Error::failed(why));
        };
        // The memory object itself, by the path at which other processes can open it.
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        command.arg("--memory").arg(path);
    }
    if untouched {
        command.arg("--untouched");
    }
    if options.vhost_user.is_some()
        && let (Some(disk), Some(pristine)) =
            (&options.test_guest.disk, &options.test_guest.pristine)
    {
        command.arg("--disk").arg(disk).arg("--pristine").arg(pristine);
    }
    // A file, because this thread does not read while it waits, and a full pipe would block the
    // process.
    let mut said = tempfile::tempfile().map_err(refused)?;
    let (out, err) = (said.try_clone().map_err(refused)?, said.try_clone().map_err(refused)?);
    let mut child =
        command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().map_err(refused)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(refused)? {
            break status;
        }
        if let Some(reason) = interrupt.reason() {
            // The process has nothing to clean up. Both calls fail if it has just exited.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::failed(reason));
        }
        thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(true);
    }
    let mut text = String::new();
    said.rewind().and_then(|()| said.read_to_string(&mut text)).map_err(refused)?;
    logger::say(text.trim_end());
    Err(Error::failed(format!(
        "cannot verify memory and disk: demand-verify ended with {}; see its message above",
        status
    )))
}
