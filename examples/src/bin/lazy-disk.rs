// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VMM with a vhost-user disk on memory that is still missing: the additions to `lazy-vm` for a
//! disk.
//!
//! The disk is another process, which maps the guest's memory itself. The guest makes it write
//! untouched memory to the disk and read it back to another address. The disk's process faults in
//! the pages it needs by itself, from the VMM's image. The guest then sums the copy.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use demand_examples::guest;
use demand_kvm::{
    DemandSlot, DemandVcpu, EngineChoice, FaultHandler, Step, open_kvm, probe, resolve,
};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, Fill, FillRate, MemfdBacking, Path, RegionConfig,
    Retrier, RetryPolicy, Stats,
};
use demand_source::LocalFile;
use demand_uffd::{DEFAULT_THREADS, FaultService};
use demand_vhost::{BackEnd, Options as BackEndOptions, Vring};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Size of memory, in bytes.
const SIZE: u64 = 16 << 20;
/// The virtqueue, each part in a separate page: all of them are missing when it is laid out.
const QUEUE_SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const HEADERS: u64 = 0x20_3000;
const STATUSES: u64 = 0x20_4000;
/// The data written to the disk, which comes from the image.
const OUT: u64 = 4 << 20;
/// The destination of the read; it holds bytes of the image until then.
const IN: u64 = 8 << 20;
/// Length of either, in bytes.
const LEN: u64 = 1 << 20;

/// A VMM whose guest's disk faults in the memory that it needs.
#[derive(Parser)]
struct Options {
    /// auto, kvm-userfault, uffd or kvm-attributes
    #[arg(long, default_value_t)]
    engine: EngineChoice,
    /// shmem, hugetlb-2m or hugetlb-1g
    #[arg(long, default_value_t = BackingKind::Shmem)]
    backing: BackingKind,
    /// Socket of a vhost-user-blk back-end, whose disk's first MiB is overwritten; without it, the
    /// vhost-device-blk in this program's folder is started on a new disk
    #[arg(long)]
    socket: Option<PathBuf>,
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lazy-disk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut device = None;
    let socket = match &options.socket {
        Some(socket) => socket.clone(),
        None => device.insert(Device::start(scratch.path())?).socket.clone(),
    };
    let image = scratch.path().join("memory.img");
    let rings = (AVAILABLE + 2, USED + 2);
    guest::write_image(&File::create(&image)?, SIZE, &guest::driver(SIZE, rings, 2, (IN, LEN))?)?;

    // As in lazy-vm.
    let probe = probe();
    let engine = resolve(options.engine, &probe)?;
    let stats = Arc::new(Stats::new());
    let region = DemandRegion::new(
        RegionConfig {
            start: GuestAddress(0),
            backing: Arc::new(MemfdBacking::new(options.backing, SIZE, true)?),
            source: Arc::new(LocalFile::open(&image)?),
            image_offset: 0,
            stats: stats.clone(),
            retrier: Retrier::new(RetryPolicy::default(), |failure| {
                eprintln!("lazy-disk: {}", failure.error);
            }),
        },
        (),
    )?;
    let memory = DemandMemory::new(vec![region])?;
    // It also serves the back-end's faults, which arrive through a userfaultfd that the back-end
    // sends.
    let service = Arc::new(FaultService::start(DEFAULT_THREADS)?);
    let mapping = service.arm_guest(memory.pagers(), engine.vcpu_trap())?.remove(0);
    let pager = memory.pagers().next().ok_or("memory has a region")?;
    let vm = Arc::new(engine.create_vm(&open_kvm()?)?);
    let slot = DemandSlot::new(vm.clone(), 0, GuestAddress(0), mapping, pager.clone(), engine)?;
    let handler = FaultHandler::for_slots([&slot])?;
    lay_out_queue(&memory)?;

    // A back-end that cannot wait for missing pages is refused here: it would read zeros, and write
    // them to its disk. Between its reply and our acknowledgement, its mapping is also armed for
    // half-filled units, which the back-end does not know about.
    let mut back_end = BackEnd::connect(&socket, BackEndOptions::default())?;
    // Only the features that the driver below supports: above all no packed rings and no event
    // indices.
    back_end.set_features(1 << VIRTIO_F_VERSION_1)?;
    back_end.share_missing_memory(&memory, &service)?;
    let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
    let vring = Vring {
        size: QUEUE_SIZE,
        descriptors: GuestAddress(DESCRIPTORS),
        available: GuestAddress(AVAILABLE),
        used: GuestAddress(USED),
        next_available: 0,
        kick: &kick,
        call: &call, // The guest polls.
    };
    back_end.set_vring(0, &vring, true)?;
    // The guest's kick goes directly from KVM to the back-end. If KVM cannot do that, the write
    // exits to the VMM.
    let address = IoEventAddress::Pio(guest::PORT_KICK.into());
    if let Err(error) = vm.register_ioevent(&kick, &address, NoDatamatch) {
        println!("note: have KVM pass kicks on: {error}; the VMM does");
    }

    let mut vcpu = DemandVcpu::new(vm.create_vcpu(0)?)?;
    vcpu.fd().set_sregs(&guest::sregs(vcpu.fd())?)?;
    vcpu.fd().set_regs(&guest::regs(SIZE))?;
    vcpu.kick().attach();
    println!("running {engine} on {} with the disk at {}", options.backing, socket.display());

    // The vCPU runs on this thread; lazy-vm runs it on a separate thread, which can be kicked.
    // Ctrl-C ends the process: the kernel closes the userfaultfd before the VM, because its
    // descriptor has the higher number, and the back-end ensures that its process reads no zeros.
    let mut sum = None;
    loop {
        let Step::Exit(exit) = vcpu.step(&handler, &memory)? else { continue };
        match exit {
            VcpuExit::IoOut(guest::PORT_KICK, _) => kick.write(1)?,
            VcpuExit::IoOut(guest::PORT_WAIT, _) => {
                // A request held by a dead back-end is never answered.
                back_end.check()?;
                thread::yield_now();
            }
            VcpuExit::IoOut(guest::PORT_SUM, data) => {
                sum = Some(u32::from_le_bytes(data.try_into()?));
            }
            VcpuExit::Hlt => break,
            exit => return Err(format!("the vCPU left with {exit:?}").into()),
        }
    }
    for request in 0..2 {
        let status: u8 = memory.read_obj(GuestAddress(STATUSES + request))?;
        if u32::from(status) != VIRTIO_BLK_S_OK {
            return Err(format!("request {request} of the disk ended with status {status}").into());
        }
    }
    for path in [Path::Guest, Path::Vmm, Path::BackEnd] {
        let report = stats.path(path);
        println!("{}: {} pages in {} faults", path.name(), report.pages, report.faults);
    }

    // Fetch the remaining pages. Then remove the traps: the back-end's, which needs a message,
    // before the service's and the slot's.
    let (sender, complete) = channel();
    memory.on_complete(move || sender.send(()).unwrap_or_default());
    let fill = Fill::start(vec![pager.clone()], FillRate::Unlimited)?;
    complete.recv()?;
    drop(fill);
    back_end.end_postcopy()?;
    service.finish()?;
    slot.finish()?;
    back_end.stop_vring(0)?;
    println!("complete and finished");

    let mut written = File::open(&image)?;
    written.seek(SeekFrom::Start(OUT))?;
    let expected = guest::sum(written.take(LEN))?;
    match sum {
        Some(sum) if sum == expected => println!("the guest's sum is right: {sum:#x}"),
        _ => return Err(format!("the guest's sum is {sum:x?}, and not {expected:#x}").into()),
    }
    if stats.path(Path::BackEnd).pages == 0 {
        return Err("the disk has faulted nothing in".into());
    }
    Ok(())
}

/// Lays out two requests, as a driver does (virtio 1.2, sections 2.7 and 5.2.6): one writes [`OUT`]
/// to the first sectors, one reads them back to [`IN`]. The guest makes them available.
///
/// Uses vm-memory, which fetches exactly the pages that it touches: without a fault, and without a
/// raw pointer that could reach a missing page.
fn lay_out_queue(memory: &DemandMemory) -> Result<()> {
    for (request, (kind, data)) in
        [(VIRTIO_BLK_T_OUT, OUT), (VIRTIO_BLK_T_IN, IN)].iter().enumerate()
    {
        let request = request as u64;
        let header = HEADERS + request * 16;
        // Type, then the first sector: 0.
        memory.write_obj(u64::from(*kind), GuestAddress(header))?;
        memory.write_obj(0u64, GuestAddress(header + 8))?;
        let status = STATUSES + request;
        memory.write_obj(0xffu8, GuestAddress(status))?;
        let device_writes = if *kind == VIRTIO_BLK_T_IN { VRING_DESC_F_WRITE } else { 0 };
        let first = request * 3;
        for (index, address, len, flags) in [
            (first, header, 16, VRING_DESC_F_NEXT),
            (first + 1, *data, LEN, VRING_DESC_F_NEXT | device_writes),
            (first + 2, status, 1, VRING_DESC_F_WRITE),
        ] {
            let descriptor = DESCRIPTORS + index * 16;
            let rest = len | u64::from(flags) << 32 | (index + 1) << 48;
            memory.write_obj(address, GuestAddress(descriptor))?;
            memory.write_obj(rest, GuestAddress(descriptor + 8))?;
        }
        memory.write_obj(first as u16, GuestAddress(AVAILABLE + 4 + request * 2))?;
    }
    // Flags and index of both rings: a driver expects zeros, but the image has other bytes.
    memory.write_obj(0u32, GuestAddress(AVAILABLE))?;
    memory.write_obj(0u32, GuestAddress(USED))?;
    Ok(())
}

/// A back-end started by this program; killed when dropped.
struct Device {
    child: Child,
    socket: PathBuf,
}

impl Device {
    fn start(folder: &FilePath) -> Result<Self> {
        let (disk, socket) = (folder.join("disk.img"), folder.join("blk.sock"));
        File::create(&disk)?.set_len(4 << 20)?;
        let program = std::env::current_exe()?.with_file_name("vhost-device-blk");
        let mut command = Command::new(&program);
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--disk")
            .arg(&disk)
            .args(["--postcopy", "require"]);
        let child = command.stdin(Stdio::null()).spawn().map_err(|error| {
            format!(
                "start {}: {error}; build it: cargo build -p vhost-device-blk",
                program.display()
            )
        })?;
        let mut this = Device { child, socket };
        let begun = Instant::now();
        while fs::symlink_metadata(&this.socket).is_err() {
            if let Some(status) = this.child.try_wait()? {
                return Err(format!("start the disk's back-end: it ended with {status}").into());
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err("start the disk's back-end: it does not listen after 30 s".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(this)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Both fail only if it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
