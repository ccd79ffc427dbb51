// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the test guest on a real KVM, in plain memory that holds all of its image.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use test_guest::content::PAGE_BYTES;
use test_guest::guest_code::{DONE, FAILED, PORT_END, PORT_WAIT};
use test_guest::guest_layout::{BLK_QUEUE_NOTIFY, ControlMemory};
use test_guest::image::write_disk;
use test_guest::plan::{Arrivals, DiskParams, Order, Plan, PlanParams, Step, Width};
use test_guest::rings::Direction;
use test_guest::verify::{Disks, FinalMemory, verify};
use test_guest::vmm_actor::run_vmm_actor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Time limit for a plan on a KVM that emulates every instruction.
const LIMIT: Duration = Duration::from_secs(120);

/// Opens KVM. Returns `None` if there is none; with `LAB=1` in the environment that is an error.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) if std::env::var_os("LAB").is_some_and(|lab| lab == "1") => {
            panic!("open /dev/kvm: {error}; LAB=1 says that there is one");
        }
        Err(error) => {
            println!("SKIPPED: open /dev/kvm: {error}");
            None
        }
    }
}

struct Machine {
    // Kept as long as the memory that it uses.
    _vm: VmFd,
    vcpus: Vec<VcpuFd>,
    control: ControlMemory,
    memory: GuestMemoryMmap<()>,
}

impl Machine {
    fn new(kvm: &Kvm, plan: &Plan) -> Self {
        let bytes = plan.params().memory_bytes;
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
        let mut page = [0; PAGE_BYTES];
        for number in 0..bytes / PAGE_BYTES as u64 {
            plan.content().page(number, &mut page);
            memory.write_slice(&page, GuestAddress(number * PAGE_BYTES as u64)).unwrap();
        }
        for (address, bytes) in plan.rings().iter().flat_map(|rings| rings.writes()) {
            memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        }
        let control = ControlMemory::new(plan).unwrap();
        let vm = kvm.create_vm().unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let slots = [
            (0, bytes, host),
            (control.layout().address(), control.size(), control.host_address()),
        ];
        for (slot, (guest_phys_addr, memory_size, userspace_addr)) in slots.into_iter().enumerate()
        {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the mappings have that size, and outlive the VM, because it is the first
            // field and so is dropped first.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpus = (0..plan.params().cpus as usize)
            .map(|cpu| {
                let vcpu = vm.create_vcpu(cpu as u64).unwrap();
                control.layout().setup_vcpu(kvm, &vcpu, cpu).unwrap();
                vcpu
            })
            .collect();
        Machine { _vm: vm, vcpus, control, memory }
    }

    /// Runs all vCPUs to the end, together with the VMM's part and a device.
    fn run(&mut self, plan: &Plan, disk: Option<&File>) {
        let (kick, kicks) = channel();
        let stop = AtomicBool::new(false);
        let vcpus = std::mem::take(&mut self.vcpus);
        let machine = &*self;
        std::thread::scope(|scope| {
            let vmm = scope
                .spawn(|| run_vmm_actor(plan, machine.control.flags(), &machine.memory, &stop));
            scope.spawn(|| {
                if let Some(disk) = disk {
                    serve(plan, &machine.memory, disk, kicks);
                }
            });
            let threads: Vec<_> = vcpus
                .into_iter()
                .enumerate()
                .map(|(cpu, vcpu)| {
                    let (stop, kick) = (&stop, kick.clone());
                    scope.spawn(move || {
                        let ended = run_vcpu(vcpu, stop, &kick);
                        let result = machine.control.result(cpu);
                        if ended.is_err() || result.state != DONE {
                            stop.store(true, Ordering::Relaxed);
                            let step = plan.program(cpu).get(result.step);
                            return Err(format!("vCPU {cpu}: {ended:?} {result:x?} {step:x?}"));
                        }
                        Ok(())
                    })
                })
                .collect();
            drop(kick);
            let ends: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(ends.iter().all(Result::is_ok), "{ends:?}");
            vmm.join().unwrap().unwrap();
        });
    }

    fn final_memory(&self, plan: &Plan) -> Vec<u8> {
        let mut bytes = vec![0; plan.params().memory_bytes as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

/// Enters a vCPU until its program has ended.
fn run_vcpu(mut vcpu: VcpuFd, stop: &AtomicBool, kick: &Sender<u32>) -> Result<(), String> {
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT_END, _)) => return Ok(()),
            Ok(VcpuExit::IoOut(PORT_WAIT, _)) => std::thread::yield_now(),
            Ok(VcpuExit::MmioWrite(BLK_QUEUE_NOTIFY, bytes)) => {
                let queue = bytes.try_into().map_err(|_| format!("a kick of {bytes:?}"))?;
                kick.send(u32::from_le_bytes(queue)).map_err(|error| error.to_string())?;
            }
            Err(error) if error.errno() == libc::EINTR => {}
            other => {
                let other = format!("{other:?}");
                return Err(format!("{other} at {:x?}", vcpu.get_regs()));
            }
        }
        if stop.load(Ordering::Relaxed) || start.elapsed() > LIMIT {
            return Err(format!("stopped at {:x?}", vcpu.get_regs()));
        }
    }
}

/// Answers requests when kicked, as a device does, until all senders of kicks are dropped. It takes
/// from the plan the data that a real device reads from descriptors; the plan's own tests check
/// those.
fn serve(plan: &Plan, memory: &GuestMemoryMmap<()>, disk: &File, kicks: Receiver<u32>) {
    let rings = plan.rings().unwrap();
    let mut done = vec![0u16; rings.queues().len()];
    for number in kicks {
        let queue = &rings.queues()[number as usize];
        let done = &mut done[number as usize];
        let available: u16 =
            memory.load(GuestAddress(queue.avail_index()), Ordering::Acquire).unwrap();
        while *done < available {
            let request = rings
                .requests()
                .iter()
                .find(|request| (u32::from(request.queue), request.index) == (number, *done))
                .unwrap();
            for (segment, offset) in request.pieces() {
                let mut bytes = vec![0; segment.len as usize];
                let address = GuestAddress(segment.address);
                if request.direction == Direction::Read {
                    disk.read_exact_at(&mut bytes, offset).unwrap();
                    memory.write_slice(&bytes, address).unwrap();
                } else {
                    memory.read_slice(&mut bytes, address).unwrap();
                    disk.write_all_at(&bytes, offset).unwrap();
                }
            }
            memory.write_obj(0u8, GuestAddress(request.status)).unwrap();
            let element = GuestAddress(queue.used + 4 + 8 * u64::from(*done));
            memory.write_obj([u32::from(request.head()), 1], element).unwrap();
            *done += 1;
            memory.store(*done, GuestAddress(queue.used_index()), Ordering::Release).unwrap();
        }
    }
}

fn params(cpus: u32, order: Order, arrivals: Arrivals) -> PlanParams {
    PlanParams {
        seed: u64::from(cpus) * 10 + order as u64,
        memory_bytes: 8 << 20,
        vm_bytes: 0,
        cpus,
        order,
        arrivals,
        touches_per_unit: 300,
        vmm_touches_per_unit: 6,
        disk: None,
    }
}

#[test]
fn plans_end_with_right_memory() {
    let Some(kvm) = kvm() else { return };
    for (cpus, order, arrivals) in [
        (1, Order::Sequential, Arrivals::Mixed),
        (2, Order::Random, Arrivals::Mixed),
        (2, Order::Strided, Arrivals::Free),
        (4, Order::Random, Arrivals::Mixed),
    ] {
        let plan = Plan::new(params(cpus, order, arrivals), None).unwrap();
        let mut machine = Machine::new(&kvm, &plan);
        let start = Instant::now();
        machine.run(&plan, None);
        println!("{cpus} vCPUs, {} touches: {:?}", plan.guest_touches(), start.elapsed());
        let bytes = machine.final_memory(&plan);
        let verdict = verify(&plan, &FinalMemory::Bytes(&bytes), None, false).unwrap();
        assert!(verdict.equal, "{:#?}", verdict.differences);
    }
}

#[test]
fn requests_are_made_and_answers_waited_for() {
    let Some(kvm) = kvm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (dir.path().join("pristine"), dir.path().join("disk"));
    write_disk(&before, 1, 4000 * 512).unwrap();
    let pristine = File::open(&before).unwrap();
    for (cpus, queues, arrivals) in
        [(1, 1, Arrivals::Mixed), (2, 3, Arrivals::Mixed), (2, 1, Arrivals::Free)]
    {
        std::fs::copy(&before, &after).unwrap();
        let disk = File::options().read(true).write(true).open(&after).unwrap();
        let mut params = params(cpus, Order::Random, arrivals);
        params.disk = Some(DiskParams {
            queues,
            queue_size: 256,
            requests: 60,
            read_sectors: 1000,
            disk_sectors: 4000,
        });
        let plan = Plan::new(params, Some(&pristine)).unwrap();
        let mut machine = Machine::new(&kvm, &plan);
        machine.run(&plan, Some(&disk));
        let bytes = machine.final_memory(&plan);
        let disks = Disks { pristine: &pristine, disk: &disk };
        let verdict = verify(&plan, &FinalMemory::Bytes(&bytes), Some(disks), false).unwrap();
        assert!(verdict.equal, "{:#?}", verdict.differences);
    }
}

#[test]
fn wrong_word_is_reported_with_its_step() {
    let Some(kvm) = kvm() else { return };
    let params = params(1, Order::Random, Arrivals::Free);
    let plan = Plan::new(params, None).unwrap();
    let mut machine = Machine::new(&kvm, &plan);
    let (step, address, expect) = plan
        .program(0)
        .iter()
        .enumerate()
        .find_map(|(i, step)| match *step {
            Step::Check { address, expect, width: Width::Eight } if i > 50 => {
                Some((i, address, expect))
            }
            _ => None,
        })
        .unwrap();
    machine.memory.write_obj(!expect, GuestAddress(address)).unwrap();
    let vcpu = machine.vcpus.pop().unwrap();
    run_vcpu(vcpu, &AtomicBool::new(false), &channel().0).unwrap();
    let result = machine.control.result(0);
    assert_eq!((result.state, result.step, result.address), (FAILED, step, address));
    assert_eq!((result.expected, result.found), (expect, !expect));
}
