// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VMM with a vhost-user disk on memory that is still missing: the additions to `lazy-vm` for a
//! disk.
//!
//! The disk is another process, which maps the guest's memory itself. The guest makes it write
//! untouched memory to the disk and read it back to another address. The disk's process faults in
//! the pages it needs by itself, from the VMM's image. The guest then sums the copy.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

// The guest and its driver: they stand for your own.
use bare_guest::{Mode, summing};
use clap::Parser;
use demand_examples::Result;
use demand_examples::device::Device;
use demand_examples::options::{self, MemoryOptions, arrived};
use demand_examples::queue;
use demand_paging::demand_kvm::open_kvm;
use demand_paging::demand_memory::FaultPath;
use demand_paging::demand_source::LocalFile;
use demand_paging::demand_vhost::{BackEnd, Options as BackEndOptions, Vring};
use demand_paging::{FillRate, Lazy, LazyBuilder, Step};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A VMM whose guest's disk faults in the memory that it needs.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    memory: MemoryOptions,
    /// Socket of a vhost-user-blk back-end, whose disk's first MiB is overwritten; without it, the
    /// vhost-device-blk in this program's folder is started on a new disk
    #[arg(long)]
    socket: Option<PathBuf>,
}

fn main() -> ExitCode {
    options::run("lazy-disk", run)
}

fn run(Options { memory: MemoryOptions { engine, backing }, socket }: &Options) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let [image, disk, own] =
        ["memory.img", "disk.img", "blk.sock"].map(|name| scratch.path().join(name));
    let socket = socket.as_ref().unwrap_or(&own);
    let _device = (*socket == own).then(|| Device::start(&disk, &own)).transpose()?;
    queue::write_image(&image)?;

    // As in lazy-vm. The service that serves the vCPU's faults also serves the back-end's, which
    // arrive through a userfaultfd that the back-end sends.
    let (finished, outcome) = channel();
    let lazy = LazyBuilder::new(Arc::new(LocalFile::open(&image)?))
        .engine(*engine)
        .backing(*backing)
        .lazy(Lazy::Require)
        .on_failure(|failure| eprintln!("lazy-disk: {failure}"))
        .on_finish(move |outcome| finished.send(outcome).unwrap_or_default())
        .build()?;
    // The driver's part. vm-memory fetches exactly the pages that it touches: without a fault, and
    // without a raw pointer that could reach a missing page.
    queue::lay_out(lazy.memory())?;
    let vm = lazy.create_vm(&open_kvm()?)?;
    let vm = lazy.attach(vm)?;

    // A back-end that cannot wait for missing pages is refused here: it would read zeros, and write
    // them to its disk. Between its reply and our acknowledgement, its mapping is also armed for
    // half-filled units, which the back-end does not know about.
    let mut back_end = BackEnd::connect(socket, BackEndOptions::default())?;
    // Only the features that the driver below supports: above all no packed rings and no event
    // indices.
    back_end.set_features(1 << VIRTIO_F_VERSION_1)?;
    let back_end = Arc::new(Mutex::new(back_end));
    vm.share_with(&back_end)?;
    let lock = || back_end.lock().unwrap_or_else(PoisonError::into_inner);
    let (kick, call) =
        (EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let vring = Vring {
        size: queue::QUEUE_SIZE,
        descriptors: GuestAddress(queue::DESCRIPTORS),
        available: GuestAddress(queue::AVAILABLE),
        used: GuestAddress(queue::USED),
        next_available: 0,
        kick: &kick,
        call: &call, // The guest polls.
    };
    lock().set_vring(0, &vring, true)?;
    // The guest's kick goes directly from KVM to the back-end. If KVM cannot do that, the write
    // exits to the VMM.
    let address = IoEventAddress::Pio(summing::PORT_KICK.into());
    if let Err(error) = vm.fd().register_ioevent(&kick, &address, NoDatamatch) {
        println!("note: have KVM pass kicks on: {error}; the VMM does");
    }

    let mut vcpu = vm.create_vcpu(0)?;
    Mode::Protected.set(vcpu.fd())?;
    vcpu.fd().set_regs(&summing::start(queue::MEMORY))?;
    let engine = vm.engine().ok_or("the memory is lazy")?;
    println!("running {engine} on {backing} with the disk at {}", socket.display());

    // The vCPU runs on this thread; lazy-vm runs it on a separate thread, which can be kicked.
    // Ctrl-C ends the process: the kernel closes the userfaultfd before the VM, because its
    // descriptor has the higher number, and the back-end ensures that its process reads no zeros.
    let mut sum = 0;
    loop {
        let Step::Exit(exit) = vcpu.step()? else { continue };
        match exit {
            VcpuExit::IoOut(summing::PORT_KICK, _) => kick.write(1)?,
            VcpuExit::IoOut(summing::PORT_WAIT, _) => {
                // A request held by a dead back-end is never answered.
                lock().check()?;
                thread::yield_now();
            }
            VcpuExit::IoOut(summing::PORT_SUM, data) => {
                sum = u32::from_le_bytes(data.try_into()?);
            }
            VcpuExit::Hlt => break,
            exit => return Err(format!("the vCPU left with {exit:?}").into()),
        }
    }
    println!("arrived: {}", arrived(vm.stats()));

    // Fetch the remaining pages. Then the traps are removed: the back-end's first, which needs a
    // message.
    vm.start_fill(FillRate::Unlimited)?;
    outcome.recv()??;
    lock().stop_vring(0)?;
    println!("complete and finished");

    queue::check(&vm.memory(), &image, sum)?;
    println!("the guest's sum is right: {sum:#x}");
    if vm.stats().path(FaultPath::BackEnd).pages == 0 {
        return Err("the disk has faulted nothing in".into());
    }
    Ok(())
}
