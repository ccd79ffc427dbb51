// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tries what needs KVM and userfaultfd together, on a scratch guest.

use std::io::{self, Write};
use std::sync::Arc;

use demand_kvm::{Engine, EngineChoice, Step, open_kvm};
use demand_memory::{Backing, BackingKind, FaultPath, MemfdBacking, PAGE_SIZE};
use demand_source::LocalFile;
use kvm_ioctls::VcpuExit;
use vm_memory::GuestAddress;

use crate::{Error, Lazy, LazyBuilder};

/// Guest physical address of the scratch guest: a page of data, then the page that holds the first
/// instruction of an x86 processor.
const START: u64 = 0xffff_e000;

/// Offset of the first instruction in the scratch guest's memory.
const RESET: usize = 0x1ff0;

/// x86: `mov al, cs:[0xe000]`, which reads the page of data, and `hlt`.
const CODE: [u8; 5] = [0x2e, 0xa0, 0x00, 0xe0, 0xf4];

/// Tries [`Engine::UffdPoison`] on a scratch guest, which takes milliseconds: the guest's first
/// page comes as from any userfaultfd, and its second must stop the vCPU by a signal. Returns
/// whether it has.
///
/// # Errors
///
/// [`Error`], if this host refuses a step: [`Error::Arm`] where the kernel has no markers or
/// this process may not use userfaultfd, [`Error::Engine`] where KVM cannot be used.
///
/// # Examples
///
/// ```
/// match demand_paging::try_markers() {
///     Ok(true) => println!("--engine uffd-poison works"),
///     Ok(false) => println!("KVM does not stop a vCPU at a marked page"),
///     Err(error) => println!("{error}"),
/// }
/// ```
pub fn try_markers() -> Result<bool, Error> {
    let kvm = open_kvm()?;
    let lazy = LazyBuilder::new(Arc::new(image().map_err(Error::Image)?))
        .region(GuestAddress(START), 2 * PAGE_SIZE)
        .engine(EngineChoice::Only(Engine::UffdPoison))
        .lazy(Lazy::Require)
        .finish_by_caller()
        .build()?;
    let vm = lazy.create_vm(&kvm)?;
    let vm = lazy.attach(vm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut stops = 0;
    // A stray signal may end a step, too.
    for _ in 0..8 {
        let before = vm.stats().path(FaultPath::Guest).pages;
        match vcpu.step()? {
            Step::Again => stops += vm.stats().path(FaultPath::Guest).pages - before,
            Step::Exit(VcpuExit::Hlt) => return Ok(stops > 0),
            Step::Exit(_) => return Ok(false),
        }
    }
    Ok(false)
}

/// Creates the image of the scratch guest.
fn image() -> io::Result<LocalFile> {
    let size = 2 * PAGE_SIZE;
    let memory = MemfdBacking::new(BackingKind::Shmem, size).map_err(io::Error::other)?;
    let mut file = &**memory.file().ok_or(io::ErrorKind::Unsupported)?;
    file.write_all(&[0xff; RESET])?;
    file.write_all(&CODE)?;
    LocalFile::of_file(file.try_clone()?, "a scratch image").map_err(io::Error::other)
}
