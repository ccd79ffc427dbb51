// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPUs that wait for pages are paused, resumed and stopped like any others.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use demand_kvm::{Engine, EngineChoice, PlainSlot, Virtualization};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, Retrier, RetryPolicy, Stats};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::LocalFile;
use demand_tests::can_run;
use demand_tests::host::skip;
use demand_vmm::config::MemoryConfig;
use demand_vmm::vcpu::set::Vcpus;
use demand_vmm::vcpu::{VcpuContext, VcpuEvent};
use demand_vmm::vm::machine::{Machine, MachineConfig};
use test_guest::guest_code::{DONE, PORT_END};
use test_guest::guest_layout::{CONTROL_ADDRESS, ControlMemory};
use test_guest::plan::{Plan, PlanParams};
use test_support::wait::until;
use test_vmm::exits::{PortWrite, TestExits};
use vm_memory::GuestAddress;

const SIZE: u64 = 16 << 20;
/// Time limit for a kick to reach a vCPU, on a busy machine as well.
const SOON: Duration = Duration::from_secs(2);

/// Events from vCPUs and from their guest.
#[derive(Debug)]
enum Said {
    Vcpu(VcpuEvent),
    Port(PortWrite),
}

/// A guest whose vCPUs read and write all its memory, ready to run.
struct Guest {
    // In drop order.
    vcpus: Vcpus,
    say: Sender<Said>,
    events: Receiver<Said>,
    _control_slot: PlainSlot,
    machine: Machine,
    control: Arc<ControlMemory>,
    image: PathBuf,
    whole: Vec<u8>,
    stats: Arc<Stats>,
    cpus: u32,
    _folder: tempfile::TempDir,
}

impl Guest {
    /// Creates a guest with this engine and backing; `None` if this host cannot run it.
    fn new(engine: Engine, backing: BackingKind, cpus: u32) -> Option<Self> {
        if !can_run(engine, backing, SIZE) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("memory.img");
        let params = PlanParams {
            memory_bytes: SIZE,
            cpus,
            touches_per_unit: 400,
            vmm_touches_per_unit: 0,
            ..PlanParams::default()
        };
        let plan = Plan::new(params, None).unwrap();
        plan.content().write_image(&image, plan.windows()).unwrap();
        let stats = Arc::new(Stats::new());
        let machine = Machine::new(MachineConfig {
            memory: &MemoryConfig { size: SIZE, backing, reserve: true, thp: false },
            engine: EngineChoice::Only(engine),
            probes: None,
            lazy: Lazy::Require,
            source: Arc::new(LocalFile::open(&image).unwrap()),
            service: ServiceOptions::default(),
            stats: stats.clone(),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        })
        .unwrap();
        let control = Arc::new(ControlMemory::new(&plan).unwrap());
        let (vm, mapping) = (machine.vm().clone(), control.mapping().clone());
        let control_slot = PlainSlot::new(vm, 100, GuestAddress(CONTROL_ADDRESS), mapping).unwrap();
        let (say, events) = channel();
        let sender = say.clone();
        let context = Arc::new(VcpuContext {
            exits: Arc::new(TestExits::new(None, move |write| {
                drop(sender.send(Said::Port(write)))
            })),
            first_run: Arc::default(),
        });
        Some(Guest {
            vcpus: Vcpus::new(context),
            say,
            events,
            _control_slot: control_slot,
            machine,
            control,
            whole: fs::read(&image).unwrap(),
            image,
            stats,
            cpus,
            _folder: folder,
        })
    }

    fn run(&mut self) {
        for cpu in 0..self.cpus {
            let vcpu = self.machine.create_vcpu(cpu).unwrap();
            self.control.layout().setup_vcpu(self.machine.kvm(), vcpu.fd(), cpu as usize).unwrap();
            let say = self.say.clone();
            self.vcpus.start(cpu, vcpu, move |event| drop(say.send(Said::Vcpu(event)))).unwrap();
        }
    }

    fn lose_source(&self) {
        OpenOptions::new().write(true).open(&self.image).unwrap().set_len(4096).unwrap();
    }

    fn restore_source(&self) {
        fs::write(&self.image, &self.whole).unwrap();
    }

    fn arrived(&self) -> u64 {
        self.stats.pages_arrived()
    }

    /// Checks that all vCPUs complete their programs, with the expected values.
    #[track_caller]
    fn comes_to_its_end(&mut self) {
        let mut left = self.cpus;
        while left > 0 {
            match self.events.recv_timeout(Duration::from_secs(60)).expect("the guest goes on") {
                Said::Port(PortWrite { port: PORT_END, value, cpu }) => {
                    let result = self.control.result(cpu as usize);
                    assert_eq!(u64::from(value), DONE, "vCPU {cpu}: {result:x?}");
                    left -= 1;
                }
                Said::Vcpu(VcpuEvent::Ended { .. }) => {}
                event => panic!("{event:?}"),
            }
        }
    }

    /// Makes vCPUs wait for pages that do not arrive.
    fn wait_for_pages(&mut self) {
        self.lose_source();
        self.run();
        let stats = self.stats.clone();
        until("somebody wants a page", || stats.source().errors > 2);
    }
}

/// Returns whether KVM emulates the guest's instructions. Its accesses are then the kernel's own,
/// and under `uffd` a kick cannot reach a vCPU that waits for a page.
fn is_out_of_reach(engine: Engine) -> bool {
    engine == Engine::Uffd && demand_kvm::probe().virtualization == Virtualization::Emulated
}

fn waiting_vcpus_are_paused_and_resumed(engine: Engine, backing: BackingKind) {
    let Some(mut guest) = Guest::new(engine, backing, 2) else { return };
    guest.wait_for_pages();
    let paused = guest.vcpus.pause(SOON);
    if is_out_of_reach(engine) {
        // The error names the vCPUs that are still inside, and they park once they leave.
        let stuck = paused.unwrap_err();
        assert!(!stuck.cpus.is_empty() && stuck.to_string().contains("source"), "{stuck}");
        guest.restore_source();
        guest.vcpus.pause(SOON).unwrap();
    } else {
        paused.unwrap();
        // The pages arrive now, but no vCPU continues.
        let waited_for = guest.arrived();
        guest.restore_source();
        until("they arrive", || guest.arrived() > waited_for);
        std::thread::sleep(Duration::from_millis(1100));
    }
    let paused = guest.arrived();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.arrived(), paused, "a paused guest wants no pages");
    assert!(guest.events.try_recv().is_err(), "a paused guest says nothing");
    guest.vcpus.resume();
    guest.comes_to_its_end();
    guest.vcpus.stop(SOON).unwrap();
}

fn running_vcpus_are_paused_many_times(engine: Engine, backing: BackingKind) {
    let Some(mut guest) = Guest::new(engine, backing, 2) else { return };
    guest.run();
    for _ in 0..40 {
        guest.vcpus.pause(SOON).unwrap();
        let paused = guest.arrived();
        std::thread::sleep(Duration::from_millis(10));
        // The page that each vCPU waited for still arrives, but no further ones. A page that the
        // service maps is counted only afterwards, so the previous one may be among those counted
        // now.
        let more = guest.arrived() - paused;
        let each = if engine.faults_by_unit() { 2 * backing.unit() / PAGE_SIZE } else { 1 };
        assert!(more <= u64::from(guest.cpus) * each, "a paused guest wanted {more} pages");
        guest.vcpus.resume();
        std::thread::sleep(Duration::from_millis(3));
    }
    guest.comes_to_its_end();
    guest.vcpus.stop(SOON).unwrap();
}

fn waiting_vcpus_are_stopped(engine: Engine, backing: BackingKind) {
    if is_out_of_reach(engine) {
        return skip("under uffd no kick reaches a vCPU of an emulating KVM that waits for a page");
    }
    for paused in [false, true] {
        let Some(mut guest) = Guest::new(engine, backing, 2) else { return };
        guest.wait_for_pages();
        if paused {
            guest.vcpus.pause(SOON).unwrap();
        }
        guest.vcpus.stop(SOON).unwrap();
        assert_eq!(guest.stats.path(FaultPath::Guest).faults, 0, "nobody has gone on");
    }
}

fn all(engine: Engine, backing: BackingKind) {
    waiting_vcpus_are_paused_and_resumed(engine, backing);
    running_vcpus_are_paused_many_times(engine, backing);
    waiting_vcpus_are_stopped(engine, backing);
}

#[test]
fn under_uffd_on_shmem() {
    all(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn under_uffd_on_hugetlb_2m() {
    all(Engine::Uffd, BackingKind::Hugetlb2M);
}

#[test]
fn under_uffd_poison_on_shmem() {
    all(Engine::UffdPoison, BackingKind::Shmem);
}

#[test]
fn under_uffd_poison_on_hugetlb_2m() {
    all(Engine::UffdPoison, BackingKind::Hugetlb2M);
}

#[test]
fn under_kvm_userfault_on_shmem() {
    all(Engine::KvmUserfault, BackingKind::Shmem);
}

#[test]
fn under_kvm_userfault_on_hugetlb_2m() {
    all(Engine::KvmUserfault, BackingKind::Hugetlb2M);
}
