// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm bench`: measures the cost of a guest's access to a missing page.
//!
//! A guest without an operating system touches each of its pages once, each vCPU in its own part of
//! memory. The same crates set the memory up as for any other machine. The bench compares what the
//! guest has read with the source, so that a wrong run yields no figure.

mod guest;
mod report;
mod source;
mod vcpus;

use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_kvm::EngineChoice;
use demand_memory::{PAGE_SIZE, Path, Retrier, RetryPolicy, Stats};
use demand_source::{Destination, PageSource};
use test_guest::plan::Order;
use vm_memory::{Bytes, GuestAddress};

use self::guest::{ADDRESS_END, Control, MEMORY_ADDRESS};
use self::vcpus::Vcpus;
use crate::arch::placement::Placement;
use crate::config::MemoryOption;
use crate::error::Error;
use crate::vm::machine::{Machine, MachineConfig};

pub use self::report::BenchReport;
pub use self::source::SourceOption;

/// The guest's access to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read of one word of the page.
    Read,
    /// A write of one word of the page.
    Write,
}

impl Access {
    const fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write",
        }
    }
}

impl FromStr for Access {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Access::Read, Access::Write]
            .into_iter()
            .find(|access| access.name() == name)
            .ok_or_else(|| "choose read or write".into())
    }
}

/// Parameters of a measurement.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Memory of each vCPU.
    pub memory: MemoryOption,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// The source of the pages.
    pub source: SourceOption,
    /// The order in which each vCPU touches its pages.
    pub order: Order,
    /// The vCPUs' access to their pages.
    pub access: Access,
    /// Number of pages that each vCPU touches; `None` for all of them.
    pub pages: Option<u64>,
}

/// Runs the measurement. `started` is when the process started.
///
/// # Errors
///
/// Returns a one-line error with its exit status, also if the guest has seen bytes that differ from
/// the source.
pub fn bench(options: &BenchOptions, started: Instant) -> Result<BenchReport, Error> {
    let MemoryOption { size, backing, reserve, thp } = options.memory;
    let pages = options.pages.unwrap_or(size / PAGE_SIZE);
    if pages == 0 || pages > size / PAGE_SIZE {
        return Err(Error::usage(format!(
            "bench: --pages {pages}: a vCPU has {} pages; give a number from 1 to that",
            size / PAGE_SIZE
        )));
    }
    // This check comes before the tables are built, because they grow with the memory.
    let most = ADDRESS_END - MEMORY_ADDRESS;
    let all = size.checked_mul(options.cpus.into()).filter(|all| *all <= most).ok_or_else(|| {
        Error::usage(format!(
            "bench: {} times {size} bytes of memory exceed the {most} that the guest can address; \
             ask for less with --memory or --cpus",
            options.cpus
        ))
    })?;
    let tables: Vec<Vec<u64>> = (0..options.cpus)
        .map(|cpu| {
            let base = MEMORY_ADDRESS + u64::from(cpu) * size;
            let touches = source::touches(options.order, pages, cpu.into());
            touches.into_iter().map(|at| base + at).collect()
        })
        .collect();

    let mut vcpus = Vcpus::new();
    let complaint = vcpus.complaint();
    // A measurement must end at once when the source fails, and not wait for it.
    let policy = RetryPolicy { limit: Some(Duration::ZERO), ..RetryPolicy::default() };
    let retrier = Retrier::new(policy, move |failure| complaint.send(failure.error.to_string()));
    let stats = Arc::new(Stats::new());
    let source = options.source.open(all)?;
    let config = MachineConfig {
        memory: &MemoryOption { size: all, backing, reserve, thp },
        engine: options.engine,
        source: source.clone(),
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
    let (guest, kvm_internal) = (stats.path(Path::Guest), stats.path(Path::KvmInternal));
    let source_reads = stats.source();

    for (cpu, (table, outcome)) in tables.iter().zip(&outcomes).enumerate() {
        verify(cpu, options.access, table, outcome.hash, &*source, &machine)?;
    }
    let begun = outcomes.iter().map(|outcome| outcome.begun).min().unwrap_or(started);
    let ended = outcomes.iter().map(|outcome| outcome.ended).max().unwrap_or(started);
    let (time, pages) = (ended.duration_since(begun), pages * u64::from(options.cpus));
    let first = vcpus.first_run().map_or(Duration::ZERO, |at| at.duration_since(started));
    Ok(BenchReport {
        engine: machine.engine_name().into(),
        backing: backing.name().into(),
        source: options.source.name(),
        order: order_name(options.order).into(),
        access: options.access.name().into(),
        cpus: options.cpus,
        memory_bytes_per_cpu: size,
        pages,
        faults: guest.faults,
        verified: true,
        time_ns: time.as_nanos() as u64,
        ns_per_page: time.as_nanos() as f64 / pages as f64,
        pages_per_second: pages as f64 / time.as_secs_f64(),
        latency_us: guest.latency_us,
        guest,
        kvm_internal,
        source_reads,
        time_to_first_instruction_us: first.as_micros() as u64,
    })
}

const fn order_name(order: Order) -> &'static str {
    match order {
        Order::Sequential => "sequential",
        Order::Random => "random",
        Order::Strided => "strided",
    }
}

/// Compares with the source both what a vCPU has read and the content of its pages.
fn verify(
    cpu: usize,
    access: Access,
    table: &[u64],
    seen: u32,
    source: &dyn PageSource,
    machine: &Machine,
) -> Result<(), Error> {
    let mut hash = 0;
    let (mut expected, mut found) = (vec![0u8; PAGE_SIZE as usize], vec![0u8; PAGE_SIZE as usize]);
    for (index, address) in table.iter().enumerate() {
        let page = address & !(PAGE_SIZE - 1);
        let mut destination = Destination::from(&mut expected[..]);
        source.read_through(page - MEMORY_ADDRESS, &mut destination).map_err(Error::failed)?;
        drop(destination);
        let word = &mut expected[(address - page) as usize..][..4];
        match access {
            Access::Read => {
                hash = guest::mix(hash, u32::from_le_bytes(word.try_into().expect("4 bytes")));
            }
            Access::Write => {
                word.copy_from_slice(&guest::written(index, table.len()).to_le_bytes());
            }
        }
        machine.memory().read_slice(&mut found, GuestAddress(page)).map_err(Error::failed)?;
        if let Some(at) = expected.iter().zip(&found).position(|(a, b)| a != b) {
            return Err(Error::failed(format!(
                "bench: wrong memory content: vCPU {cpu}: expected {:#04x} at guest address \
                 {:#x}, found {:#04x}",
                expected[at],
                page + at as u64,
                found[at]
            )));
        }
    }
    if hash != seen {
        return Err(Error::failed(format!(
            "bench: wrong memory content: vCPU {cpu} computed {seen:#x} from the words that it \
             read, the source's give {hash:#x}"
        )));
    }
    Ok(())
}
