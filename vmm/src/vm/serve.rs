// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm --api-socket PATH`: a process that begins without a VM, and gets it by its API.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use crate::api::server::ApiServer;
use crate::config::SerialConfig;
use crate::error::Error;
use crate::report::outputs::Outputs;
use crate::snapshot::dir;
use crate::vm::host::{Host, Message, ServedHost, Start};
use crate::vm::linux::{self, LinuxOptions};
use crate::vm::restore::{RestoreOptions, restore};
use crate::vm::session::{ApiPlace, Ended, GuestOptions, listen_for_signals};

/// The name of the console's file in errors, as in a VM's configuration.
const SERIAL: &str = "serial";

/// Serves the API on a socket, and runs the VM that a client asks for until it ends; `None` means
/// that the process was asked to end before there was a VM. `guest` has the options of the process,
/// and `outputs` its files, which are checked against those of the VM. `started` is when the
/// process started; call this before it starts other threads.
///
/// # Errors
///
/// One line, with its exit status, if the API cannot be served. A VM that cannot be set up is an
/// error for the client alone; the log has it, too.
pub(crate) fn serve(
    socket: &Path,
    guest: &GuestOptions,
    outputs: &mut Outputs,
    started: Instant,
) -> Result<Option<Ended>, Error> {
    let interrupt = listen_for_signals()?;
    let (sender, messages) = channel();
    let end = sender.clone();
    let _told = interrupt.when_raised(move || drop(end.send(Message::End)));
    let host = Arc::new(Host::new(sender, interrupt, started));
    let server = ApiServer::start(socket, host.clone())?;
    let served = Arc::new(ServedHost::new(host.clone(), server));
    let ended = loop {
        let Ok(Message::Start(start)) = messages.recv() else { break None };
        let is_ending = || host.had_vm() || host.interrupt().reason().is_some();
        let guest = GuestOptions { api: ApiPlace::Host(served.clone()), ..guest.clone() };
        match run(*start, guest, outputs, started) {
            Ok(Ended { outcome: Err(error), .. }) | Err(error) if !is_ending() => {
                log::error!("the VM was not started: {error}");
                outputs.remove(SERIAL);
                host.give_up_start(&error);
            }
            Ok(ended) => break Some(ended),
            Err(_) => break None,
        }
    };
    served.close(ended.as_ref().map_or(Ok(()), |ended| ended.outcome.as_ref().copied()));
    Ok(ended)
}

fn run(
    start: Start,
    guest: GuestOptions,
    outputs: &mut Outputs,
    started: Instant,
) -> Result<Ended, Error> {
    // Checked, and kept until the end.
    let mut check = |serial: &SerialConfig, inputs: &[&Path]| {
        outputs.check_inputs(inputs)?;
        match serial {
            SerialConfig::File(path) => outputs.add(SERIAL, path, inputs),
            SerialConfig::Terminal | SerialConfig::Off => Ok(()),
        }
    };
    match start {
        Start::Boot(config) => {
            check(&config.serial, &config.boot_files().collect::<Vec<_>>())?;
            linux::run(LinuxOptions::new(config, guest), started)
        }
        Start::Restore(config) => {
            let files = config.source.directory().map(dir::files);
            let files: Vec<_> = files.iter().flatten().map(PathBuf::as_path).collect();
            check(&config.serial, &files)?;
            restore(RestoreOptions::new(config, guest), started)
        }
    }
}
