// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that begins without a VM: what its API offers before the VM exists, and then passes on
//! to it.
//!
//! ```text
//!        vm.create           vm.boot
//! Empty -----------> Created -------> Starting -----> VM (see `lifecycle`) -----> Ended
//!   ^ \                                |   ^
//!   |  \------------ vm.restore -------|---/
//!   +------ the VM does not start -----+
//! ```
//!
//! There is one VM in a process's life, because the process ends with its VM, as it does for `run`
//! and `restore`. A VM that cannot be set up was none: the process is empty again.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use demand_memory::{PAGE_SIZE, Stats};

use crate::api::events::{EventKind, EventLog};
use crate::api::server::ApiServer;
use crate::api::{
    Control, ControlError, DeviceStatus, SnapshotRequest, SnapshotSummary, State, Status,
};
use crate::config::names::with_keys;
use crate::config::vm::{RestoreConfig, VmConfig};
use crate::config::{RestoreMemory, VhostUserConfig};
use crate::error::Error;
use crate::report::micros;
use crate::sync::LockExt;
use crate::vm::Vm;
use crate::vm::interrupt::Interrupt;
use crate::vm::sources::SourceFigures;

/// A message to the thread that runs the VM.
#[derive(Debug)]
pub(crate) enum Message {
    /// Start a VM.
    Start(Box<Start>),
    /// End the process.
    End,
}

/// A VM to start.
#[derive(Clone, Debug)]
pub(crate) enum Start {
    /// Boots a kernel.
    Boot(VmConfig),
    /// Restores a snapshot.
    Restore(RestoreConfig),
}

impl Start {
    fn devices(&self) -> &[VhostUserConfig] {
        match self {
            Start::Boot(config) => &config.devices,
            Start::Restore(config) => &config.devices,
        }
    }
}

/// The sender of the answer to a request for a VM.
type Answer = Sender<Result<(), ControlError>>;

enum Stage {
    Empty,
    Created(VmConfig),
    /// The VM is being set up.
    Starting(Start),
    Vm(Arc<Vm>),
    Ended,
}

struct Inner {
    stage: Stage,
    /// The answer that a client waits for.
    answer: Option<Answer>,
}

/// A process that begins without a VM, as its API sees it.
pub(crate) struct Host {
    inner: Mutex<Inner>,
    messages: Sender<Message>,
    events: Arc<EventLog>,
    interrupt: Interrupt,
    started: Instant,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("interrupt", &self.interrupt).finish_non_exhaustive()
    }
}

/// A host with the server of its API.
#[derive(Debug)]
pub(crate) struct ServedHost {
    pub(crate) host: Arc<Host>,
    server: Mutex<Option<ApiServer>>,
}

impl ServedHost {
    /// Combines a host with its server.
    pub(crate) fn new(host: Arc<Host>, server: ApiServer) -> Self {
        ServedHost { host, server: Mutex::new(Some(server)) }
    }

    /// Answers a request for the VM that waits, adds the last event, and ends the server. Repeated
    /// calls do no harm.
    pub(crate) fn close(&self, outcome: Result<(), &Error>) {
        self.host.close(outcome);
        let server = self.server.lock_always().take();
        drop(server);
    }
}

impl Host {
    /// Creates a host without a VM, which sends `messages` to the thread that runs it. `started` is
    /// when the process started.
    pub(crate) fn new(messages: Sender<Message>, interrupt: Interrupt, started: Instant) -> Self {
        let inner = Inner { stage: Stage::Empty, answer: None };
        let (inner, events) = (Mutex::new(inner), Arc::default());
        Host { inner, messages, events, interrupt, started }
    }

    /// Returns the interrupt that ends the process.
    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Passes requests on to this VM from now on.
    pub(crate) fn attach(&self, vm: Arc<Vm>) {
        self.inner.lock_always().stage = Stage::Vm(vm);
    }

    /// Whether a VM was set up, even if it has ended.
    pub(crate) fn had_vm(&self) -> bool {
        matches!(self.inner.lock_always().stage, Stage::Vm(_) | Stage::Ended)
    }

    /// Answers the request for the VM, if a client waits.
    pub(crate) fn answer(&self, outcome: Result<(), ControlError>) {
        if let Some(answer) = self.inner.lock_always().answer.take() {
            let _ = answer.send(outcome);
        }
    }

    /// Takes note of a VM that could not be set up.
    pub(crate) fn give_up_start(&self, error: &Error) {
        self.inner.lock_always().stage = Stage::Empty;
        self.events.add(EventKind::StartFailed { error: line_for_clients(error) });
        self.answer(Err(ControlError::of_start(error)));
    }

    fn close(&self, outcome: Result<(), &Error>) {
        self.inner.lock_always().stage = Stage::Ended;
        match outcome {
            Ok(()) => {
                let ended = "cannot start the VM: the process was asked to end; start another";
                self.answer(Err(ControlError::failed(ended)));
                self.events.end(0, None);
            }
            Err(error) => {
                self.answer(Err(ControlError::of_start(error)));
                self.events.end(error.exit_status(), Some(line_for_clients(error)));
            }
        }
    }

    /// Returns the VM, or an error for a request that needs one.
    fn vm(&self, request: &str) -> Result<Arc<Vm>, ControlError> {
        let why = match &self.inner.lock_always().stage {
            Stage::Vm(vm) => return Ok(vm.clone()),
            Stage::Empty => "there is no VM; create and boot one, or restore one",
            Stage::Created(_) => "the VM has not been booted; boot it",
            Stage::Starting(_) => "the VM is starting; retry when it runs",
            Stage::Ended => "the VM has ended; start another demand-vmm",
        };
        Err(ControlError::wrong_state(format_args!("cannot {request}: {why}")))
    }

    /// Asks the other thread for a VM, if the stage allows it, and waits until it runs.
    fn start(
        &self,
        allowed: impl FnOnce(&Stage) -> Result<Start, ControlError>,
    ) -> Result<(), ControlError> {
        let (answer, outcome) = channel();
        {
            let mut inner = self.inner.lock_always();
            let start = allowed(&inner.stage)?;
            inner.stage = Stage::Starting(start.clone());
            inner.answer = Some(answer);
            let _ = self.messages.send(Message::Start(Box::new(start)));
        }
        let gone = |_| {
            Err(ControlError::failed("cannot start the VM: the process is ending; start another"))
        };
        outcome.recv().unwrap_or_else(gone)
    }

    fn status_of(&self, stage: &Stage) -> Status {
        let (state, start) = match stage {
            Stage::Empty => (State::Empty, None),
            Stage::Created(config) => (State::Created, Some(Start::Boot(config.clone()))),
            Stage::Starting(start) => (State::Starting, Some(start.clone())),
            Stage::Vm(_) | Stage::Ended => (State::Stopped, None),
        };
        let (memory, cpus) = match &start {
            Some(Start::Boot(config)) => (config.memory.clone().into(), config.cpus),
            Some(Start::Restore(config)) => (config.memory.clone(), config.cpus.unwrap_or(0)),
            None => (RestoreMemory::default(), 0),
        };
        let device = |config: &VhostUserConfig| DeviceStatus {
            kind: config.kind.to_string(),
            socket: Some(config.socket.display().to_string()),
            state: "configured".into(),
        };
        Status {
            state,
            engine: "none".into(),
            backing: memory.backing.map_or("none".into(), |backing| backing.to_string()),
            memory_bytes: memory.size.unwrap_or(0),
            cpus,
            pages_total: memory.size.unwrap_or(0) / PAGE_SIZE,
            pages_present: 0,
            devices: start.iter().flat_map(Start::devices).map(device).collect(),
            uptime_us: micros(self.started.elapsed()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            guest: None,
            snapshot: None,
            last_error: None,
            sources: Vec::new(),
            limits: Vec::new(),
            working_set: None,
        }
    }
}

impl Control for Host {
    fn status(&self) -> Status {
        let vm = match &self.inner.lock_always().stage {
            Stage::Vm(vm) => vm.clone(),
            stage => return self.status_of(stage),
        };
        vm.status()
    }

    fn stats(&self) -> Option<Arc<Stats>> {
        let vm = match &self.inner.lock_always().stage {
            Stage::Vm(vm) => vm.clone(),
            _ => return None,
        };
        vm.stats()
    }

    fn source_figures(&self) -> SourceFigures {
        let vm = match &self.inner.lock_always().stage {
            Stage::Vm(vm) => vm.clone(),
            _ => return SourceFigures::default(),
        };
        vm.source_figures()
    }

    fn events(&self) -> Arc<EventLog> {
        self.events.clone()
    }

    fn create(&self, config: &VmConfig) -> Result<(), ControlError> {
        let mut inner = self.inner.lock_always();
        match &inner.stage {
            Stage::Empty => {}
            Stage::Created(_) => {
                return Err(ControlError::wrong_state(
                    "cannot create a VM: one was created already; boot it, or shut it down and \
                     start another demand-vmm",
                ));
            }
            stage => return Err(taken("create", stage)),
        }
        crate::vm::linux::check(config).map_err(|error| ControlError::of_start(&error))?;
        let (memory_bytes, cpus) = (config.memory.size, config.cpus);
        self.events.add(EventKind::Created { memory_bytes, cpus });
        inner.stage = Stage::Created(config.clone());
        Ok(())
    }

    fn boot(&self) -> Result<(), ControlError> {
        self.start(|stage| match stage {
            Stage::Created(config) => Ok(Start::Boot(config.clone())),
            Stage::Empty => {
                let none = "cannot boot a VM: there is none; create one";
                Err(ControlError::wrong_state(none))
            }
            stage => Err(taken("boot", stage)),
        })
    }

    fn restore(&self, config: &RestoreConfig) -> Result<(), ControlError> {
        self.start(|stage| match stage {
            Stage::Empty => Ok(Start::Restore(config.clone())),
            Stage::Created(_) => Err(ControlError::wrong_state(
                "cannot restore a VM: another one was created; boot it, or restore in another \
                 demand-vmm",
            )),
            stage => Err(taken("restore", stage)),
        })
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.vm("pause")?.pause()
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.vm("resume")?.resume()
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
        self.vm("take a snapshot")?.snapshot(request)
    }

    fn shutdown(&self) -> Result<(), ControlError> {
        let mut inner = self.inner.lock_always();
        match &inner.stage {
            Stage::Vm(vm) => {
                let vm = vm.clone();
                drop(inner);
                return vm.shutdown();
            }
            // The steps of a start may wait for a back-end, or for pages.
            Stage::Starting(_) => {
                drop(inner);
                self.interrupt.raise("ended by a request");
            }
            Stage::Empty | Stage::Created(_) | Stage::Ended => inner.stage = Stage::Ended,
        }
        let _ = self.messages.send(Message::End);
        Ok(())
    }
}

/// Returns an error's line in the words of clients, which know keys and no options.
fn line_for_clients(error: &Error) -> String {
    with_keys(&error.to_string(), |_| true)
}

/// Returns the error for a request for a VM in a process that has one.
fn taken(request: &str, stage: &Stage) -> ControlError {
    let why = match stage {
        Stage::Ended => "the process is ending",
        Stage::Starting(_) => "this process starts one already",
        _ => "this process runs one already",
    };
    let hint = "start another demand-vmm for it";
    ControlError::wrong_state(format_args!("cannot {request} a VM: {why}; {hint}"))
}
