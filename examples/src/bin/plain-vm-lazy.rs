// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A plain VMM made lazy: the guest runs at once, and its memory comes from the image as it is
//! used. `docs/LAZY.md` explains each line that differs from `plain-vm`.

use std::process::ExitCode;
use std::sync::Arc;

use bare_guest::{Mode, summing};
use clap::Parser;
use demand_examples::Result;
use demand_examples::options::{self, ImageOptions};
use demand_paging::demand_source::{LocalFile, PageSource};
use demand_paging::{FillRate, LazyBuilder, Step};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A VMM whose guest sums its memory.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    image: ImageOptions,
}

fn main() -> ExitCode {
    options::run("plain-vm-lazy", run)
}

/// Stands for a device: it reads guest memory through vm-memory.
fn describe(memory: &impl GuestMemoryBackend) -> Result<()> {
    let size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    let word: u32 = memory.read_obj(GuestAddress(size / 2))?;
    println!("running on {} MiB, whose middle word is {word:#x}", size >> 20);
    Ok(())
}

fn run(Options { image }: &Options) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let image = image.path(scratch.path())?;
    let source = Arc::new(LocalFile::open(&image)?);
    let size = source.size();
    let lazy = LazyBuilder::new(source)
        .fill(FillRate::Unlimited)
        .on_failure(|failure| eprintln!("plain-vm-lazy: {failure}"))
        .build()?;
    describe(lazy.memory())?;

    let kvm = Kvm::new()?;
    let vm = lazy.attach(kvm.create_vm()?)?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.fd().get_sregs()?;
    Mode::Protected.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.fd().set_regs(&summing::start(size))?;

    let mut sum = 0;
    loop {
        let Step::Exit(exit) = vcpu.step()? else { continue };
        match exit {
            VcpuExit::IoOut(summing::PORT_SUM, data) => {
                sum = u32::from_le_bytes(data.try_into()?);
            }
            VcpuExit::Hlt => break,
            exit => return Err(format!("the vCPU left with {exit:?}").into()),
        }
    }
    summing::check(&image, 0..size, sum)?;
    println!("the guest's sum is right: {sum:#x}");
    Ok(())
}
