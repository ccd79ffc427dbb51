// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The facts of a run from which its report is made, at any moment and on any thread, so that every
//! kind of end can report.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use demand_kvm::Engine;
use demand_memory::Stats;
use demand_paging::LazyMemory;

use crate::api::events::{EventLog, VmEvent, now_us};
use crate::config::MemoryConfig;
use crate::report::{Moment, Report, micros, picture, size};
use crate::vm::sources::{SourceFigures, Sources};
use crate::vm::working_set::WorkingSetRun;

/// The facts about the machine of a run.
#[derive(Debug)]
struct MachineFacts {
    engine: &'static str,
    memory: MemoryConfig,
    cpus: u32,
    pages: u64,
}

/// The facts of a run.
#[derive(Debug)]
pub(crate) struct Record {
    stage: String,
    pub(crate) started: Instant,
    pub(crate) stats: Arc<Stats>,
    /// The events of the run, and the time by the host's clock at which the statistics begin, in
    /// microseconds since 1970.
    log: Arc<EventLog>,
    began_us: u64,
    machine: OnceLock<MachineFacts>,
    is_running: AtomicBool,
    /// The time at which the first vCPU entered the guest.
    pub(crate) first_run: Arc<OnceLock<Instant>>,
    /// The time at which the last page became present.
    pub(crate) completed: OnceLock<Instant>,
    /// The places that pages come from.
    pub(crate) sources: Arc<Sources>,
    /// The working set.
    pub(crate) working_set: OnceLock<Arc<WorkingSetRun>>,
    /// The number of bytes that background fill kept in flight at its end.
    pub(crate) fill_in_flight_bytes: OnceLock<u64>,
}

impl Record {
    /// Creates the record of a run that has not begun.
    pub(crate) fn new(stage: String, started: Instant, log: Arc<EventLog>) -> Arc<Self> {
        Arc::new(Record {
            stage,
            started,
            stats: Arc::new(Stats::new()),
            log,
            began_us: now_us(),
            machine: OnceLock::new(),
            is_running: AtomicBool::new(false),
            first_run: Arc::default(),
            completed: OnceLock::new(),
            sources: Arc::default(),
            working_set: OnceLock::new(),
            fill_in_flight_bytes: OnceLock::new(),
        })
    }

    /// Stores the facts about the machine.
    pub(crate) fn set_machine(&self, machine: &LazyMemory, memory: &MemoryConfig, cpus: u32) {
        let pages = machine.memory().pagers().map(|pager| pager.pages()).sum();
        let (engine, memory) = (machine.engine().map_or("none", Engine::name), memory.clone());
        let size = size(memory.size);
        log::info!("VM: {size} of {}, engine {engine}, {cpus} vCPUs", memory.backing);
        let _ = self.machine.set(MachineFacts { engine, memory, cpus, pages });
    }

    /// Notes that the vCPUs run.
    pub(crate) fn set_running(&self) {
        self.is_running.store(true, Ordering::Release);
    }

    /// Returns whether the vCPUs have run, so that even a run that failed has figures.
    pub(crate) fn has_begun(&self) -> bool {
        self.is_running.load(Ordering::Acquire)
    }

    /// Returns the report of the run so far. `error` is the error that ended it.
    pub(crate) fn report(&self, error: Option<String>) -> Report {
        let since_start = |instant: &Instant| micros(instant.duration_since(self.started));
        let mut report = Report {
            stage: self.stage.clone(),
            engine: "none".into(),
            time_to_first_instruction_us: self.first_run.get().map_or(0, since_start),
            time_to_complete_us: self.completed.get().map_or(0, since_start),
            fill_in_flight_bytes: self.fill_in_flight_bytes.get().copied().unwrap_or(0),
            error,
            ..Report::default()
        };
        if let Some(machine) = self.machine.get() {
            report.engine = machine.engine.into();
            report.backing = machine.memory.backing.to_string();
            report.memory_bytes = machine.memory.size;
            report.cpus = machine.cpus;
        }
        let SourceFigures { cache, remote } = self.sources.figures();
        (report.cache, report.remote) = (cache, remote);
        report.working_set = self.working_set.get().map(|run| run.report());
        report.set_paths(&self.stats);
        report
    }

    /// Draws the memory of the run over time (SVG).
    pub(crate) fn picture(&self, report: &Report) -> String {
        let pages = self.machine.get().map_or(0, |machine| machine.pages);
        let moment = |event: VmEvent| {
            // Those of an earlier VM of the process are not of this run.
            let at_us = event.time_us.checked_sub(self.began_us)?;
            Some(Moment { at_us, what: event.kind.moment()? })
        };
        let moments: Vec<_> = self.log.kept().into_iter().filter_map(moment).collect();
        picture(report, &self.stats, pages, &moments)
    }
}
