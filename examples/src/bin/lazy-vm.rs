// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A whole VMM on demand-paged memory, as a starting point for others: KVM, one vCPU, and memory
//! that is fetched from a file as the guest touches it.
//!
//! The guest sums its memory, from the last word down. Halfway it reports its sum, and from then on
//! a background fill fetches the remaining pages, from the first page up. When the last page is
//! present, the demand-paging machinery is removed while the guest keeps running.

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use demand_examples::guest;
use demand_kvm::{
    DemandSlot, DemandVcpu, EngineChoice, FaultHandler, MsrTrap, Step, hide_nested, open_kvm,
    own_pages, probe, resolve,
};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, Fill, FillRate, MemfdBacking, Path, RegionConfig,
    Retrier, RetryPolicy, Stats,
};
use demand_source::{LocalFile, PageSource};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use kvm_ioctls::VcpuExit;
use vm_memory::GuestAddress;
use vmm_sys_util::signal::register_signal_handler;

/// Maximum memory in MiB that the guest can use: many machines have devices above.
const MOST: u64 = 2048;

/// A VMM whose guest's memory arrives as it is touched.
#[derive(Parser)]
struct Options {
    /// auto, kvm-userfault, uffd or kvm-attributes
    #[arg(long, default_value_t)]
    engine: EngineChoice,
    /// shmem, hugetlb-2m or hugetlb-1g
    #[arg(long, default_value_t = BackingKind::Shmem)]
    backing: BackingKind,
    /// An image of memory kept by an earlier run; without it, a small one is created
    #[arg(long)]
    image: Option<PathBuf>,
    /// MiB of memory of the created image
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=MOST))]
    mib: u64,
    /// Keep the created image at this path
    #[arg(long, conflicts_with = "image")]
    keep: Option<PathBuf>,
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Messages of the other threads to the main thread.
enum Event {
    /// The guest's sum so far.
    Sum(u32),
    /// All pages are present.
    Complete,
    /// The vCPU has halted, or failed.
    Ended(std::result::Result<(), String>),
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lazy-vm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    register_signal_handler(libc::SIGINT, on_interrupt)?;
    let scratch = tempfile::tempdir()?;
    let made = options.keep.clone().unwrap_or_else(|| scratch.path().join("memory.img"));
    if options.image.is_none() {
        let size = options.mib << 20;
        let refused = |error| format!("write image {}: {error}; free space there", made.display());
        let code = guest::walker(size)?;
        let write = |file: File| guest::write_image(&file, size, &code);
        File::create(&made).and_then(write).map_err(refused)?;
    }
    let image = options.image.as_ref().unwrap_or(&made);

    // The engine traps the vCPU's accesses. It is found by probing, because kernels do not
    // advertise it; an unavailable engine that was requested by name is an error here, and never
    // replaced by another.
    let probe = probe();
    let engine = resolve(options.engine, &probe)?;
    let features = probe.kvm.as_ref().map_err(Clone::clone)?;
    probe.limits(engine).iter().for_each(|limit| println!("note: {limit}"));

    // Memory with all pages missing: nothing is read yet, whatever the image's size. A failed read
    // is retried forever while the page stays missing; print the error, because the guest waits.
    let source = Arc::new(LocalFile::open(image)?);
    let size = source.size();
    if size > MOST << 20 {
        let most = format!("the guest has no use for more than {MOST} MiB");
        return Err(format!("run {}: {most}; use a smaller image", image.display()).into());
    }
    let stats = Arc::new(Stats::new());
    let region = DemandRegion::new(
        RegionConfig {
            start: GuestAddress(0),
            backing: Arc::new(MemfdBacking::new(options.backing, size, true)?),
            source,
            image_offset: 0,
            stats: stats.clone(),
            retrier: Retrier::new(RetryPolicy::default(), |failure| {
                eprintln!("lazy-vm: {}", failure.error);
            }),
        },
        (),
    )?;
    let memory = DemandMemory::new(vec![region])?;

    // The guest's mapping, armed by a userfaultfd BEFORE anything can touch it: a page touched
    // earlier reads as zeros forever. With `uffd` this traps the vCPU; with the other engines KVM
    // does that, and this traps KVM's own accesses.
    let service = FaultService::start(DEFAULT_THREADS)?;
    let mapping = service.arm_guest(memory.pagers(), engine.vcpu_trap())?.remove(0);
    let pager = memory.pagers().next().ok_or("memory has a region")?;

    // KVM may itself wait for a page, where no signal reaches it, and a VM that is closed during
    // that wait can never be killed. The slot prevents this: it keeps the VM until it is dropped,
    // and its drop ends every wait in its range, with an error and never with zeros, whatever is
    // dropped first.
    let kvm = open_kvm()?;
    let vm = Arc::new(engine.create_vm(&kvm)?); // kvm-attributes needs a special VM type.
    // When a guest gives KVM the address of a page through an MSR (kvm-clock, for example), KVM
    // writes there at once, bypassing the engine. With this trap the vCPU exits instead, and its
    // step fetches the page.
    let msr_trap = MsrTrap::new(&vm)?;
    let slot = DemandSlot::new(vm.clone(), 0, GuestAddress(0), mapping, pager.clone(), engine)?
        .with_features(features);
    let handler = FaultHandler::for_slots([&slot])?;

    let vcpu = DemandVcpu::new(vm.create_vcpu(0)?)?;
    let kick = vcpu.kick().clone();
    let mut cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    if probe.hides_nested(engine) {
        // For nested guests, KVM maps pages beyond those touched, whether present or missing.
        hide_nested(&mut cpuid);
    }
    vcpu.fd().set_cpuid2(&cpuid)?;
    // Setting registers makes KVM read the memory that they (and MSRs, which only a restored guest
    // has) refer to, so fetch those pages first.
    let sregs = guest::sregs(vcpu.fd())?;
    handler.fetch_pages(&own_pages(&[], Some(&sregs)), kick.waiter())?;
    vcpu.fd().set_sregs(&sregs)?;
    vcpu.fd().set_regs(&guest::regs(size))?;

    let (sender, events) = channel();
    let complete = sender.clone();
    memory.on_complete(move || drop(complete.send(Event::Complete)));
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let thread = {
        let (stop, memory) = (stop.clone(), memory.clone());
        thread::Builder::new().name("vcpu".into()).spawn(move || {
            let ended = run_vcpu(vcpu, &handler, &memory, &stop, &sender);
            let _ = sender.send(Event::Ended(ended.map_err(|error| error.to_string())));
        })?
    };
    println!("running {engine} on {} of {} MiB", options.backing, size >> 20);

    // Nothing after this may return before the vCPU has left the guest: the memory's traps must
    // outlive its run.
    let outcome = watch(&events, &memory, &stats, || {
        // All pages are present. Unregister and close the userfaultfd; then make KVM drop the
        // bitmap, and use huge pages again if the backing has them.
        service.finish()?;
        slot.finish()?;
        Ok(msr_trap.remove()?)
    });
    // First set the flag, then kick: the vCPU clears the kick, then checks the flag.
    stop.store(true, Ordering::Release);
    kick.kick();
    let patience = Instant::now() + Duration::from_secs(2);
    while !thread.is_finished() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(1));
    }
    if !thread.is_finished() {
        // It waits inside KVM for a page that does not arrive, where no kick reaches it.
        eprintln!("lazy-vm: the source does not answer; the guest is ended in the middle");
    }
    // From here on no thread waits for a page, not even inside KVM, and no thread reads zeros.
    memory.revoke();
    let _ = thread.join(); // A panic there has already been printed.
    let seen = outcome?;

    let expected = guest::sum(File::open(image)?)?;
    if seen != expected {
        return Err(format!("the guest's sum is {seen:#x}, the image's {expected:#x}").into());
    }
    println!("the guest's sum is right: {seen:#x}, after {} ms", started.elapsed().as_millis());
    Ok(())
}

/// Processes events until the guest has halted and all pages are present; calls `finish` when the
/// last page is present. Returns the guest's sum.
fn watch(
    events: &Receiver<Event>,
    memory: &DemandMemory,
    stats: &Stats,
    finish: impl Fn() -> Result<()>,
) -> Result<u32> {
    let (mut fill, mut finished, mut ended, mut sum) = (None, false, false, 0);
    while !(finished && ended) {
        match events.recv_timeout(Duration::from_millis(100)) {
            Ok(Event::Sum(so_far)) => {
                sum = so_far;
                if fill.is_none() {
                    println!("half of memory summed; arrived so far: {}", arrived(stats));
                    // Before this, it would only compete with the pages that the guest needs to
                    // start.
                    let pagers = memory.pagers().cloned().collect();
                    fill = Some(Fill::start(pagers, FillRate::Unlimited)?);
                }
            }
            Ok(Event::Complete) => {
                finish()?;
                finished = true;
                println!("complete and finished; arrived: {}", arrived(stats));
            }
            Ok(Event::Ended(outcome)) => {
                outcome?;
                ended = true;
            }
            Err(RecvTimeoutError::Timeout) if INTERRUPTED.load(Ordering::Relaxed) => {
                return Err("ended by Ctrl-C".into());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err("the vCPU ended silently".into()),
        }
    }
    Ok(sum)
}

fn arrived(stats: &Stats) -> String {
    let path = |path: Path| {
        let report = stats.path(path);
        format!("{} {} pages in {} faults", path.name(), report.pages, report.faults)
    };
    [Path::Guest, Path::KvmInternal, Path::Fill].map(path).join(", ")
}

/// Runs the vCPU on its thread until the guest halts or `stop` is set.
fn run_vcpu(
    mut vcpu: DemandVcpu,
    handler: &FaultHandler,
    memory: &DemandMemory,
    stop: &AtomicBool,
    events: &Sender<Event>,
) -> Result<()> {
    vcpu.kick().attach();
    while !stop.load(Ordering::Acquire) {
        match vcpu.step(handler, memory)? {
            // The guest touched a missing page, which this thread has fetched; or the vCPU was
            // kicked.
            Step::Again => {}
            Step::Exit(VcpuExit::IoOut(guest::PORT_SUM, data)) => {
                events.send(Event::Sum(u32::from_le_bytes(data.try_into()?)))?;
            }
            Step::Exit(VcpuExit::Hlt) => return Ok(()),
            Step::Exit(exit) => return Err(format!("the vCPU left with {exit:?}").into()),
        }
    }
    Ok(())
}
