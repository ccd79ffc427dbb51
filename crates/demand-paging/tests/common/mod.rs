// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that sums its memory, on the crate's handles.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bare_guest::{Mode, summing};
use demand_paging::demand_kvm::{self, open_kvm};
use demand_paging::demand_source::LocalFile;
use demand_paging::{
    BackingKind, Engine, EngineChoice, Error, Lazy, LazyBuilder, LazyMemory, LazyVcpu, LazyVm, Step,
};
use kvm_ioctls::VcpuExit;
use tempfile::NamedTempFile;
use test_support::host::{has_kvm, skip};
use vm_memory::GuestMemoryBackend;

/// Size of the guest's memory, in bytes.
pub const SIZE: u64 = 16 << 20;
/// Its number of pages.
pub const PAGES: u64 = SIZE / 4096;
/// Longest time in which an end without a silent source counts as prompt.
pub const PROMPT: Duration = Duration::from_secs(1);

/// Returns the image of a guest that sums its memory; `None` without KVM.
pub fn image() -> Option<NamedTempFile> {
    image_of(SIZE)
}

/// Returns an image of `size` bytes, like [`image`].
pub fn image_of(size: u64) -> Option<NamedTempFile> {
    if !has_kvm() {
        skip("/dev/kvm is needed");
        return None;
    }
    let image = NamedTempFile::new().unwrap();
    summing::write_walker(image.path(), size).unwrap();
    Some(image)
}

/// Returns a builder of memory from an image.
pub fn lazy(image: &Path) -> LazyBuilder {
    LazyBuilder::new(Arc::new(LocalFile::open(image).unwrap()))
}

/// Returns the engines that this host has.
pub fn engines() -> Vec<Engine> {
    let probe = demand_kvm::probe();
    probe.engines().into_iter().filter(|report| report.usable).map(|report| report.engine).collect()
}

/// Builds memory of each kind and for each engine that this host has, and calls `test` with it.
pub fn each(image: &Path, test: impl Fn(LazyBuilder, (Engine, BackingKind))) {
    for engine in engines() {
        for kind in [BackingKind::Shmem, BackingKind::Hugetlb2M] {
            let huge = kind == BackingKind::Hugetlb2M;
            let pool = huge.then(|| test_support::host::huge_pages(SIZE / kind.unit()));
            if let Some(None) = pool {
                continue;
            }
            println!("{engine} on {kind}");
            let builder = lazy(image).engine(EngineChoice::Only(engine)).lazy(Lazy::Require);
            test(builder.backing(kind), (engine, kind));
        }
    }
}

/// Gives memory to a VM of its type.
pub fn attach(memory: LazyMemory) -> Result<LazyVm, Error> {
    let vm = memory.create_vm(&open_kvm()?)?;
    memory.attach(vm)
}

/// Creates the vCPU at the guest's first instruction.
pub fn vcpu(vm: &LazyVm) -> LazyVcpu {
    vcpu_numbered(vm, 0)
}

/// Creates vCPU `number`, like [`vcpu`].
pub fn vcpu_numbered(vm: &LazyVm, number: u64) -> LazyVcpu {
    let vcpu = vm.create_vcpu(number).unwrap();
    let mut sregs = vcpu.fd().get_sregs().unwrap();
    Mode::Protected.apply(&mut sregs);
    vcpu.set_sregs(&sregs).unwrap();
    let size = vm.memory().last_addr().0 + 1;
    vcpu.fd().set_regs(&summing::start(size)).unwrap();
    vcpu
}

/// Runs the guest until it halts, and returns the last sum that it has written.
pub fn run(vcpu: &mut LazyVcpu) -> Result<u32, Error> {
    let mut sum = 0;
    loop {
        match vcpu.step()? {
            Step::Again => {}
            Step::Exit(VcpuExit::IoOut(summing::PORT_SUM, data)) => {
                sum = u32::from_le_bytes(data.try_into().unwrap());
            }
            Step::Exit(VcpuExit::Hlt) => return Ok(sum),
            Step::Exit(exit) => panic!("{exit:?}"),
        }
    }
}

/// Checks a guest's sum against the image's.
pub fn check(image: &Path, sum: u32) -> io::Result<()> {
    summing::check(image, 0..SIZE, sum)
}
