// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VMM on demand-paged memory, as a starting point for others: KVM, one vCPU on its own thread,
//! and memory that is fetched from a file as the guest touches it. The guest sums its memory, from
//! the last word down. From halfway on, a background fill fetches the rest, from the first page up.
//! When the last page is present, demand paging is removed while the guest keeps running.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

// The guest: it stands for your own.
use bare_guest::{Mode, summing};
use clap::Parser;
use demand_examples::options::{self, ImageOptions, MemoryOptions, arrived};
use demand_examples::{Result, interrupt};
use demand_paging::demand_kvm::open_kvm;
use demand_paging::demand_source::{LocalFile, PageSource};
use demand_paging::{FillRate, Lazy, LazyBuilder, LazyVcpu, Step};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuExit;

/// A VMM whose guest's memory arrives as it is touched.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    image: ImageOptions,
}

fn main() -> ExitCode {
    options::run("lazy-vm", run)
}

fn run(Options { memory: MemoryOptions { engine, backing }, image }: &Options) -> Result<()> {
    interrupt::catch()?;
    let scratch = tempfile::tempdir()?;
    let image = image.path(scratch.path())?;

    // Nothing is read yet, whatever the image's size. A failed read is retried forever while the
    // page stays missing; print the error, because the guest waits.
    let source = Arc::new(LocalFile::open(&image)?);
    let (size, (sender, events)) = (source.size(), channel());
    let removed = sender.clone();
    let lazy = LazyBuilder::new(source)
        .engine(*engine)
        .backing(*backing)
        .lazy(Lazy::Require)
        .on_failure(|failure| eprintln!("lazy-vm: {failure}"))
        .on_finish(move |outcome| removed.send(Event::Removed(outcome)).unwrap_or_default())
        .build()?;
    lazy.limits().iter().for_each(|limit| println!("note: {limit}"));
    println!("running {} on {backing} of {} MiB", lazy.engine().ok_or("lazy")?, size >> 20);

    let kvm = open_kvm()?;
    let vm = lazy.create_vm(&kvm)?; // kvm-attributes needs a special VM type.
    let vm = lazy.attach(vm)?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.fd().get_sregs()?;
    Mode::Protected.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.fd().set_regs(&summing::start(size))?;

    let started = Instant::now();
    thread::spawn(move || {
        let outcome = run_vcpu(vcpu, &sender).map_err(|error| error.to_string());
        sender.send(Event::Halted(outcome)).unwrap_or_default();
    });
    // Any return from here on drops `vm`, which ends everything in order: the vCPU leaves the guest
    // even while it waits for a page, and its next step is an error.
    let (mut sums, mut halted, mut removed) = (Vec::new(), false, false);
    while !(halted && removed) {
        match events.recv_timeout(Duration::from_millis(10)) {
            Ok(Event::Sum(sum)) => {
                if sums.is_empty() {
                    println!("half of memory summed; arrived so far: {}", arrived(vm.stats()));
                    // Earlier it would only compete with the pages that the guest needs to start.
                    vm.start_fill(FillRate::Unlimited)?;
                }
                sums.push(sum);
            }
            Ok(Event::Halted(outcome)) => (halted, ()) = (true, outcome?),
            Ok(Event::Removed(outcome)) => {
                (removed, ()) = (true, outcome?);
                println!("complete and finished; arrived: {}", arrived(vm.stats()));
            }
            Err(_) if interrupt::raised() => return Err("ended by Ctrl-C".into()),
            Err(_) => {}
        }
    }
    let sum = sums.pop().ok_or("the guest has no sum")?;
    summing::check(&image, 0..size, sum)?;
    println!("the guest's sum is right: {sum:#x}, after {} ms", started.elapsed().as_millis());
    Ok(())
}

/// A message to the main thread.
enum Event {
    /// A sum of the guest: of half of its memory, then of all.
    Sum(u32),
    /// The guest has halted, or failed.
    Halted(std::result::Result<(), String>),
    /// All pages are present, and demand paging is removed.
    Removed(std::result::Result<(), demand_paging::Error>),
}

/// Runs the vCPU on its thread until the guest halts.
fn run_vcpu(mut vcpu: LazyVcpu, events: &Sender<Event>) -> Result<()> {
    loop {
        // Otherwise the guest touched a missing page, which has arrived; or the vCPU was kicked.
        let Step::Exit(exit) = vcpu.step()? else { continue };
        match exit {
            VcpuExit::IoOut(summing::PORT_SUM, data) => {
                events.send(Event::Sum(u32::from_le_bytes(data.try_into()?)))?;
            }
            VcpuExit::Hlt => return Ok(()),
            exit => return Err(format!("the vCPU left with {exit:?}").into()),
        }
    }
}
