// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When the last page is present the machinery is removed: the VM is mapped like one that was never
//! demand-paged, no userfaultfd is open, and no thread remains.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bare_guest::{Mode, summing};
use demand_kvm::{Engine, EngineChoice, FaultHandler, MarkerFaults, PlainSlot, VcpuKick, open_kvm};
use demand_memory::{
    Backing, BackingKind, FaultPath, Fill, FillRate, MemfdBacking, PageRange, Pager, PagerConfig,
    Retrier, RetryPolicy, Stats, Waiter,
};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::LocalFile;
use demand_tests::host::skip;
use demand_tests::{can_run, userfaultfds_of};
use demand_vmm::config::MemoryConfig;
use demand_vmm::vm::machine::{Machine, MachineConfig};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use test_support::wait::until;
use vm_memory::GuestAddress;

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A process has one descriptor table and one set of threads, so only one test runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A guest that repeatedly sums words of all its memory.
struct Walker {
    vcpu: VcpuFd,
    kick: VcpuKick,
    markers: MarkerFaults,
}

impl Walker {
    fn new(vm: &VmFd) -> Self {
        let vcpu = vm.create_vcpu(0).unwrap();
        Mode::Protected.set(&vcpu).unwrap();
        let kick = VcpuKick::new(&vcpu).unwrap();
        kick.attach();
        Walker { vcpu, kick, markers: MarkerFaults::default() }
    }

    /// Walks through memory once; returns the sum.
    fn walk(&mut self, handler: Option<&FaultHandler>) -> u32 {
        self.vcpu.set_regs(&summing::start(SIZE)).unwrap();
        let mut sum = 0;
        loop {
            if let Some(handler) = handler {
                self.markers.prepare(&self.vcpu, handler).unwrap();
            }
            let exit = match (self.vcpu.run(), handler) {
                (Err(error), Some(handler)) if error.errno() == libc::EINTR => {
                    assert!(self.markers.resolve(handler, self.kick.waiter()).unwrap());
                    continue;
                }
                (exit, _) => exit.unwrap(),
            };
            match (exit, handler) {
                (VcpuExit::MemoryFault { flags, gpa, size }, Some(handler)) => {
                    handler.handle(gpa, size, flags, self.kick.waiter()).unwrap();
                }
                (VcpuExit::IoOut(summing::PORT_SUM, data), _) => {
                    sum = u32::from_le_bytes(data.try_into().unwrap());
                }
                (VcpuExit::Hlt, _) => return sum,
                (exit, _) => panic!("{exit:?}"),
            }
        }
    }
}

/// Returns the number of pages of 4096 bytes and of 2 MiB with which KVM maps a guest's memory.
/// Must be called on the thread that created the VM. `None` if KVM does not report it.
fn mapped(vm: &VmFd) -> Option<(u64, u64)> {
    // SAFETY: the call has no arguments and cannot fail.
    let thread = unsafe { libc::gettid() };
    let folder = format!("/sys/kernel/debug/kvm/{thread}-{}", vm.as_raw_fd());
    let count = |name| fs::read_to_string(format!("{folder}/{name}")).ok()?.trim().parse().ok();
    Some((count("pages_4k")?, count("pages_2m")?))
}

fn open_userfaultfds() -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target == Path::new("anon_inode:[userfaultfd]"))
        .count()
}

/// Returns the names of demand paging's threads.
fn our_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread may end meanwhile.
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let ours = |name: &str| name.starts_with("uffd-") || ["fill", "retry"].contains(&name);
    names.map(|name| name.trim().to_owned()).filter(|name| ours(name)).collect()
}

/// Returns the page counts of a VM that was never demand-paged, over the same kind of memory.
fn plain(image: &Path, backing: BackingKind, expected: u32) -> Option<(u64, u64)> {
    let memory = Arc::new(MemfdBacking::new(backing, SIZE).unwrap());
    let source = Arc::new(LocalFile::open(image).unwrap());
    let retrier = Retrier::new(RetryPolicy::default(), |failure| panic!("{}", failure.error));
    let pager =
        Pager::new(PagerConfig { retrier, ..PagerConfig::new(memory.clone(), source) }).unwrap();
    pager.ensure(PageRange::new(0, pager.pages()), FaultPath::Fill, &Waiter::new()).unwrap();
    let vm = Arc::new(open_kvm().unwrap().create_vm().unwrap());
    let mapping = Arc::new(memory.map().unwrap());
    let _slot = PlainSlot::new(vm.clone(), 0, GuestAddress(0), mapping).unwrap();
    let mut walker = Walker::new(&vm);
    for _ in 0..2 {
        assert_eq!(walker.walk(None), expected);
    }
    mapped(&vm)
}

fn nothing_is_left(engine: Engine, backing: BackingKind) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Including the plain VM's memory.
    if !can_run(engine, backing, 2 * SIZE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("memory.img");
    summing::write_walker(&image, SIZE).unwrap();
    let expected = summing::sum(File::open(&image).unwrap()).unwrap();
    let plain = plain(&image, backing, expected);

    let whole = fs::read(&image).unwrap();
    let machine = Machine::new(MachineConfig {
        memory: &MemoryConfig { size: SIZE, backing, reserve: true, thp: false },
        engine: EngineChoice::Only(engine),
        probes: None,
        lazy: Lazy::Require,
        source: Arc::new(LocalFile::open(&image).unwrap()),
        service: ServiceOptions::default(),
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    })
    .unwrap();
    let (sender, complete) = channel();
    machine.on_complete(move || sender.send(()).unwrap());
    let handler = machine.fault_handler().clone();
    let mut walker = Walker::new(machine.vm());

    // All of the machinery is running, including the retry thread.
    OpenOptions::new().write(true).open(&image).unwrap().set_len(0).unwrap();
    let pagers = machine.pagers().cloned().collect();
    let fill = Fill::start(pagers, FillRate::BytesPerSecond(SIZE)).unwrap();
    until("all of its threads run", || {
        let threads = our_threads();
        ["uffd-0", "uffd-1", "fill", "retry"].iter().all(|name| threads.contains(&name.to_string()))
    });
    assert_eq!(open_userfaultfds(), userfaultfds_of(engine, backing));
    fs::write(&image, &whole).unwrap();
    assert_eq!(walker.walk(Some(&handler)), expected);
    complete.recv_timeout(PATIENCE).unwrap();
    drop(fill);
    if engine == Engine::KvmUserfault
        && let Some((_, huge)) = mapped(machine.vm())
    {
        assert_eq!(huge, 0, "vCPUs fault at 4096 bytes");
    }

    machine.finish().unwrap();
    assert_eq!(walker.walk(Some(&handler)), expected);
    assert_eq!(open_userfaultfds(), 0);
    until("its threads end", || our_threads().is_empty());
    match (plain, mapped(machine.vm())) {
        (Some(plain), Some(after)) => {
            println!("{engine} on {backing}: {} of 4K and {} of 2M", after.0, after.1);
            assert_eq!(after, plain, "pages of 4K and of 2M, as in a plain VM");
            let huge = if backing == BackingKind::Shmem { 0 } else { SIZE / backing.unit() };
            assert_eq!(after.1, huge, "all of memory");
        }
        _ => skip("this KVM does not tell how it maps a guest's memory (debugfs)"),
    }
}

#[test]
fn of_uffd_on_shmem() {
    nothing_is_left(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn of_uffd_on_hugetlb_2m() {
    nothing_is_left(Engine::Uffd, BackingKind::Hugetlb2M);
}

#[test]
fn of_uffd_poison_on_shmem() {
    nothing_is_left(Engine::UffdPoison, BackingKind::Shmem);
}

#[test]
fn of_uffd_poison_on_hugetlb_2m() {
    nothing_is_left(Engine::UffdPoison, BackingKind::Hugetlb2M);
}

#[test]
fn of_kvm_userfault_on_shmem() {
    nothing_is_left(Engine::KvmUserfault, BackingKind::Shmem);
}

#[test]
fn of_kvm_userfault_on_hugetlb_2m() {
    nothing_is_left(Engine::KvmUserfault, BackingKind::Hugetlb2M);
}

#[test]
fn of_kvm_attributes_on_shmem() {
    nothing_is_left(Engine::KvmAttributes, BackingKind::Shmem);
}

#[test]
fn of_kvm_attributes_on_hugetlb_2m() {
    nothing_is_left(Engine::KvmAttributes, BackingKind::Hugetlb2M);
}
