// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A plain VMM: the guest's memory is read from an image before the guest runs. `docs/LAZY.md`
//! makes it lazy, which is `plain-vm-lazy`.

use std::fs::File;
use std::process::ExitCode;

use bare_guest::{Mode, summing};
use clap::Parser;
use demand_examples::Result;
use demand_examples::options::{self, ImageOptions};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A VMM whose guest sums its memory.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    image: ImageOptions,
}

fn main() -> ExitCode {
    options::run("plain-vm", run)
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
    let mut file = File::open(&image)?;
    let size = file.metadata()?.len();
    let length = usize::try_from(size)?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), length)])?;
    memory.read_exact_volatile_from(GuestAddress(0), &mut file, length)?;
    describe(&memory)?;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: `memory` keeps the region mapped, and outlives the vCPU.
        unsafe { vm.set_user_memory_region(region)? };
    }

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    Mode::Protected.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&summing::start(size))?;

    let mut sum = 0;
    loop {
        match vcpu.run()? {
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
