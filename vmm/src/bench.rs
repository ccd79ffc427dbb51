// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm bench`: measures the cost of a guest's access to a missing page.
//!
//! A guest without an operating system touches each of its pages once, each vCPU in its own part of
//! memory. The same crates set the memory up as for any other machine. The bench compares what the
//! guest has read with the source, so that a wrong run yields no figure.

mod error;
mod guest;
mod options;
mod report;
mod source;
mod touches;
mod vcpus;
mod verify;

use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_memory::{FaultPath, PAGE_SIZE, Retrier, RetryPolicy, Stats};
use demand_paging::Lazy;
use vm_memory::GuestAddress;

use self::error::BenchError;
use self::guest::{ADDRESS_END, Control, MEMORY_ADDRESS};
use self::report::ServiceReport;
use self::touches::touches;
use self::vcpus::Vcpus;
use self::verify::Verifier;
use crate::arch::placement::Placement;
use crate::config::MemoryConfig;
use crate::error::Error;
use crate::vm::kept_probes::kept_probes;
use crate::vm::machine::{Machine, MachineConfig};

pub(crate) use self::options::{Access, BenchOptions};
pub use self::report::BenchReport;
pub(crate) use self::source::SourceOption;
pub(crate) use self::touches::Order;

/// Runs the measurement. `started` is when the process started.
///
/// # Errors
///
/// Returns a one-line error with its exit status, also if the guest has seen bytes that differ from
/// the source.
pub fn bench(options: &BenchOptions, started: Instant) -> Result<BenchReport, Error> {
    let MemoryConfig { size, backing, reserve, thp } = options.memory;
    let pages = options.pages.unwrap_or(size / PAGE_SIZE);
    if pages == 0 || pages > size / PAGE_SIZE {
        return Err(BenchError::Pages { wanted: pages, most: size / PAGE_SIZE }.into());
    }
    // This check comes before the tables are built, because they grow with the memory.
    let most = ADDRESS_END - MEMORY_ADDRESS;
    let all = size.checked_mul(options.cpus.into()).filter(|all| *all <= most);
    let all = all.ok_or(BenchError::Memory { cpus: options.cpus, size, most })?;
    let tables: Vec<Vec<u64>> = (0..options.cpus)
        .map(|cpu| {
            let base = MEMORY_ADDRESS + u64::from(cpu) * size;
            touches(options.order, pages, cpu.into()).into_iter().map(|at| base + at).collect()
        })
        .collect();

    let mut vcpus = Vcpus::new();
    let complaint = vcpus.complaint();
    // A measurement ends when the source first fails, and does not wait for it.
    let retrier = Retrier::new(RetryPolicy::default(), move |failure| {
        complaint.send(failure.error.to_string())
    });
    let stats = Arc::new(Stats::new());
    let source = options.source.open(all)?;
    let config = MachineConfig {
        memory: &MemoryConfig { size: all, backing, reserve, thp },
        engine: options.engine,
        probes: kept_probes(),
        lazy: Lazy::Require,
        source: source.clone(),
        service: options.service(),
        stats: stats.clone(),
        retrier,
    };
    let region = Placement { start: GuestAddress(MEMORY_ADDRESS), size: all, image_offset: 0 };
    let machine = Machine::with_regions(config, &[region])?;
    let control = Control::new(machine.vm(), options.access, &tables)?;
    let made: Result<Vec<_>, _> =
        (0..options.cpus).map(|cpu| control.vcpu(machine.kvm(), machine.vm(), cpu)).collect();
    let outcomes = vcpus.run(&machine, made?)?;
    // The fault counts are complete only after the serving threads have ended: a thread counts the
    // last fault after the guest has resumed.
    machine.service().stop();
    let (guest, kvm_internal) =
        (stats.path(FaultPath::Guest), stats.path(FaultPath::HypervisorInternal));
    let source_reads = stats.source();
    let service = machine.service().counts();

    let access = options.access;
    let verifier = Verifier { access, source: &*source, memory: machine.memory() };
    for (cpu, (table, outcome)) in tables.iter().zip(&outcomes).enumerate() {
        verifier.verify(cpu, table, outcome.hash)?;
    }
    let begun = outcomes.iter().map(|outcome| outcome.begun).min().unwrap_or(started);
    let ended = outcomes.iter().map(|outcome| outcome.ended).max().unwrap_or(started);
    let cpu_begun = outcomes.iter().map(|outcome| outcome.cpu_begun).min().unwrap_or_default();
    let cpu_ended = outcomes.iter().map(|outcome| outcome.cpu_ended).max().unwrap_or_default();
    let cpu_time = cpu_ended.saturating_sub(cpu_begun);
    let (time, pages) = (ended.duration_since(begun), pages * u64::from(options.cpus));
    let first = vcpus.first_run().map_or(Duration::ZERO, |at| at.duration_since(started));
    Ok(BenchReport {
        engine: machine.engine_name().into(),
        backing: backing.name().into(),
        source: options.source.name(),
        order: options.order.name().into(),
        access: access.name().into(),
        cpus: options.cpus,
        memory_bytes_per_cpu: size,
        pages,
        faults: guest.faults,
        verified: true,
        time_ns: saturating(time.as_nanos()),
        cpu_time_ns: saturating(cpu_time.as_nanos()),
        ns_per_page: time.as_nanos() as f64 / pages as f64,
        pages_per_second: pages as f64 / time.as_secs_f64(),
        latency_us: guest.latency_us,
        guest,
        kvm_internal,
        source_reads,
        service: ServiceReport::from(service),
        time_to_first_instruction_us: saturating(first.as_micros()),
    })
}

fn saturating(duration: u128) -> u64 {
    u64::try_from(duration).unwrap_or(u64::MAX)
}
