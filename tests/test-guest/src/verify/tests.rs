// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Executes plans on the simulated machine, and checks the verifier's results.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::content::{PAGE_BYTES, UNIT_BYTES};
use crate::image::write_disk;
use crate::plan::{Arrivals, DiskParams, Order, Plan, PlanError, PlanParams, Role};
use crate::rings::Direction;
use crate::simulation::Machine;
use crate::verify::{Disks, FinalMemory, Place, VerifyError, describe, verify};
use crate::windows::LOW_MEMORY_END;

const PAGE: u64 = PAGE_BYTES as u64;
const READ_SECTORS: u64 = 1000;
const DISK_SECTORS: u64 = 4000;

struct TestDisk {
    dir: tempfile::TempDir,
    pristine: File,
}

impl TestDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_disk(&dir.path().join("pristine"), 9, (DISK_SECTORS + 3) * 512).unwrap();
        let pristine = File::open(dir.path().join("pristine")).unwrap();
        TestDisk { dir, pristine }
    }

    /// Creates an unmodified disk.
    fn fresh(&self) -> File {
        std::fs::copy(self.dir.path().join("pristine"), self.dir.path().join("disk")).unwrap();
        File::options().read(true).write(true).open(self.dir.path().join("disk")).unwrap()
    }
}

fn params(seed: u64) -> PlanParams {
    let random = |n| crate::content::hash(seed, n, 77);
    PlanParams {
        seed,
        memory_bytes: (2 + random(0) % 6) * UNIT_BYTES,
        vm_bytes: [0, 3 << 30, (3 << 30) + UNIT_BYTES, 5 << 30][(random(9) % 4) as usize],
        cpus: [1, 2, 3, 4, 8][(random(1) % 5) as usize],
        order: [Order::Sequential, Order::Random, Order::Strided][(random(2) % 3) as usize],
        arrivals: if random(3) % 3 == 0 { Arrivals::Free } else { Arrivals::Mixed },
        touches_per_unit: [0, 1, 60, 512][(random(4) % 4) as usize],
        vmm_touches_per_unit: [0, 1, 5, 30][(random(5) % 4) as usize],
        disk: (random(6) % 4 > 0).then(|| {
            let (queues, queue_size) = (1 + (random(7) % 5) as u16, 64);
            DiskParams {
                queues,
                queue_size,
                requests: [0, 1, 7, 21 * u32::from(queues)][(random(8) % 4) as usize].min(48),
                read_sectors: READ_SECTORS,
                disk_sectors: DISK_SECTORS,
            }
        }),
    }
}

fn full_params(seed: u64) -> PlanParams {
    PlanParams {
        seed,
        memory_bytes: 4 * UNIT_BYTES,
        cpus: 2,
        touches_per_unit: 200,
        vmm_touches_per_unit: 20,
        disk: Some(DiskParams {
            queues: 2,
            queue_size: 128,
            requests: 60,
            read_sectors: READ_SECTORS,
            disk_sectors: DISK_SECTORS,
        }),
        ..PlanParams::default()
    }
}

/// Writes the memory of the plan's VM to one file for each region.
fn files_of(plan: &Plan, memory: &[u8]) -> Vec<File> {
    let vm_bytes = plan.windows().vm_bytes();
    let low = vm_bytes.min(LOW_MEMORY_END);
    let sizes = [low, vm_bytes - low];
    let files: Vec<File> = sizes
        .into_iter()
        .filter(|&size| size > 0)
        .map(|size| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            file
        })
        .collect();
    for window in plan.windows().list() {
        let bytes = &memory[window.offset as usize..][..window.bytes as usize];
        let high = usize::from(window.packed >= low);
        files[high].write_all_at(bytes, window.packed - low * high as u64).unwrap();
    }
    files
}

#[test]
fn plans_end_with_right_memory_for_many_seeds() {
    let test = TestDisk::new();
    for seed in 0..80 {
        let params = params(seed);
        let plan = Plan::new(params.clone(), Some(&test.pristine)).unwrap();
        for schedule in 0..3 {
            let disk = test.fresh();
            let mut machine = Machine::new(&plan, Some(&disk), seed * 10 + schedule);
            machine.run();
            let files = files_of(&plan, &machine.memory);
            let memory = match params.vm_bytes {
                0 => FinalMemory::Bytes(&machine.memory),
                _ => FinalMemory::open(&files).unwrap(),
            };
            let disks = Disks { pristine: &test.pristine, disk: &disk };
            let verdict = verify(&plan, &memory, Some(disks), true).unwrap();
            assert!(verdict.equal, "{params:?}: {:#?}", verdict.differences);
            assert_eq!(verdict.memory_bytes, params.memory_bytes);
            assert_eq!(verdict.disk_bytes, (DISK_SECTORS + 3) * 512);
        }
    }
}

/// Roles and requests match the parameters.
#[test]
fn everything_takes_part() {
    let test = TestDisk::new();
    let plan = Plan::new(full_params(1), Some(&test.pristine)).unwrap();
    assert_eq!(plan.requests().len(), 60);
    let mut roles: HashMap<String, usize> = HashMap::new();
    for role in plan.roles() {
        let name = format!("{role:?}");
        *roles.entry(name.split('(').next().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(roles.len(), 10, "{roles:?}");
    for direction in [Direction::Read, Direction::Write] {
        let count = plan.requests().iter().filter(|r| r.direction == direction).count();
        assert!(count > 10, "{count}");
    }
    assert!(plan.requests().iter().any(|r| r.data.len() > 1));
    assert!(plan.requests().iter().any(|r| r.data[0].len > 4096));
    assert!(plan.requests().iter().any(|r| r.data[0].len % 4096 != 0));
    assert!(plan.guest_touches() >= 800);
    // Stores do not overlap, and change the memory.
    for pair in plan.stores().windows(2) {
        assert!(pair[0].address + pair[0].width.bytes() <= pair[1].address);
    }
}

#[test]
fn one_wrong_byte_of_any_role_is_found() {
    let test = TestDisk::new();
    let disk = test.fresh();
    let plan = Plan::new(full_params(2), Some(&test.pristine)).unwrap();
    let mut machine = Machine::new(&plan, Some(&disk), 1);
    machine.run();
    let disks = Disks { pristine: &test.pristine, disk: &disk };
    let mut wanted: HashMap<String, u64> = HashMap::new();
    for (page, role) in plan.roles().iter().enumerate() {
        wanted.insert(describe(*role), page as u64);
    }
    // Also at the written places.
    let mut places: Vec<u64> = wanted.values().map(|page| page * PAGE + 4095).collect();
    places.extend([plan.stores()[0].address, plan.requests()[0].data[0].address]);
    let ring = &plan.rings().unwrap().queues()[1];
    places.extend([ring.descriptors, ring.avail_index(), ring.avail + 4]);
    places.extend([plan.requests()[0].header + 3, plan.requests()[0].status]);
    for at in places {
        machine.memory[at as usize] ^= 0x10;
        let verdict =
            verify(&plan, &FinalMemory::Bytes(&machine.memory), Some(disks), false).unwrap();
        assert!(!verdict.equal);
        assert_eq!(verdict.difference_count, 1, "{at:#x} {:#?}", verdict.differences);
        let difference = &verdict.differences[0];
        assert_eq!((difference.offset, difference.bytes), (at, 1));
        assert_eq!(difference.role, describe(plan.roles()[(at / PAGE) as usize]));
        machine.memory[at as usize] ^= 0x10;
    }
    // A page that never arrived, and one that arrived twice.
    let page = plan.roles().iter().position(|r| matches!(r, Role::GuestWrite(_))).unwrap();
    let bytes: &mut [u8; PAGE_BYTES] =
        machine.memory[page * PAGE_BYTES..].first_chunk_mut().unwrap();
    let before = *bytes;
    plan.content().page(page as u64, bytes);
    let verdict = verify(&plan, &FinalMemory::Bytes(&machine.memory), Some(disks), false).unwrap();
    let note = &verdict.differences[0].note;
    assert!(note.contains("image's") || note.contains("zeros"), "{note}");
    machine.memory[page * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(&before);
    let verdict = verify(&plan, &FinalMemory::Bytes(&machine.memory), Some(disks), false).unwrap();
    assert!(verdict.equal);
}

#[test]
fn wrong_used_rings_are_found() {
    let test = TestDisk::new();
    let disk = test.fresh();
    let plan = Plan::new(full_params(3), Some(&test.pristine)).unwrap();
    let mut machine = Machine::new(&plan, Some(&disk), 1);
    machine.run();
    let disks = Disks { pristine: &test.pristine, disk: &disk };
    let queue = &plan.rings().unwrap().queues()[0];
    let used = |i| queue.used_element(i) as usize;
    type Damage<'a> = &'a dyn Fn(&mut [u8]);
    let damages: [(&str, Damage<'_>); 6] = [
        ("one answer less", &|m| m[queue.used_index() as usize] -= 1),
        ("flags", &|m| m[queue.used as usize] = 2),
        ("an id that there is not", &|m| m[used(0) + 1] = 0xff),
        ("an id twice", &|m| m.copy_within(used(0)..used(0) + 4, used(1))),
        ("too long", &|m| m[used(2) + 6] = 1),
        ("behind the last answer", &|m| m[used(queue.requests)] ^= 1),
    ];
    for (what, damage) in damages {
        let mut memory = machine.memory.clone();
        damage(&mut memory);
        let verdict = verify(&plan, &FinalMemory::Bytes(&memory), Some(disks), false).unwrap();
        assert_eq!(verdict.difference_count, 1, "{what}: {:#?}", verdict.differences);
    }
    // A device may suppress notifications, and set its avail_event.
    let mut memory = machine.memory.clone();
    memory[queue.used as usize] = 1;
    memory[queue.avail_event() as usize] = queue.requests as u8;
    assert!(verify(&plan, &FinalMemory::Bytes(&memory), Some(disks), false).unwrap().equal);
}

#[test]
fn wrong_disks_are_found() {
    let test = TestDisk::new();
    let disk = test.fresh();
    let plan = Plan::new(full_params(4), Some(&test.pristine)).unwrap();
    let mut machine = Machine::new(&plan, Some(&disk), 1);
    machine.run();
    let memory = FinalMemory::Bytes(&machine.memory);
    let disks = Disks { pristine: &test.pristine, disk: &disk };
    assert!(verify(&plan, &memory, Some(disks), false).unwrap().equal);
    assert!(matches!(verify(&plan, &memory, None, false), Err(VerifyError::NoDisk)));

    let request = plan.requests().iter().find(|r| r.direction == Direction::Write).unwrap();
    for (offset, role) in [
        (request.sector * 512, "written by request"),
        (5, "only ever read"),
        (DISK_SECTORS * 512 - 1, "written by no request"),
        ((DISK_SECTORS + 3) * 512 - 1, "behind the sectors"),
    ] {
        let mut byte = [0];
        disk.read_exact_at(&mut byte, offset).unwrap();
        disk.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        let verdict = verify(&plan, &memory, Some(disks), false).unwrap();
        assert_eq!(verdict.difference_count, 1, "{:#?}", verdict.differences);
        let difference = &verdict.differences[0];
        assert_eq!((difference.place, difference.offset), (Place::Disk, offset));
        assert!(difference.role.starts_with(role), "{difference}");
        disk.write_all_at(&byte, offset).unwrap();
    }
    // A lost write: the pristine disk's sectors are still in place.
    let mut piece = vec![0; request.bytes() as usize];
    disk.read_exact_at(&mut piece, request.sector * 512).unwrap();
    let mut old = piece.clone();
    test.pristine.read_exact_at(&mut old, request.sector * 512).unwrap();
    disk.write_all_at(&old, request.sector * 512).unwrap();
    assert!(!verify(&plan, &memory, Some(disks), false).unwrap().equal);
    disk.write_all_at(&piece, request.sector * 512).unwrap();
    disk.set_len((DISK_SECTORS + 2) * 512).unwrap();
    let verdict = verify(&plan, &memory, Some(disks), false).unwrap();
    assert_eq!(verdict.differences[0].role, "the length of the disk");
}

#[test]
fn memory_in_files_is_read_or_mapped() {
    let params = PlanParams { memory_bytes: 2 * UNIT_BYTES, ..PlanParams::default() };
    let plan = Plan::new(params, None).unwrap();
    let mut machine = Machine::new(&plan, None, 1);
    machine.run();
    let files = [tempfile::tempfile().unwrap()];
    let file = &files[0];
    let is_mapped = |memory: &FinalMemory<'_>| matches!(memory, FinalMemory::Files(parts) if parts[0].is_mapped());
    file.write_all_at(&machine.memory, 0).unwrap();
    let memory = FinalMemory::open(&files).unwrap();
    assert!(is_mapped(&memory));
    assert!(verify(&plan, &memory, None, false).unwrap().equal);
    file.write_all_at(&[machine.memory[5000] ^ 1], 5000).unwrap();
    assert!(!verify(&plan, &memory, None, false).unwrap().equal);
    drop(memory);
    // Longer than its allocated part: it is read.
    file.set_len(4 * UNIT_BYTES).unwrap();
    let memory = FinalMemory::open(&files).unwrap();
    assert!(!is_mapped(&memory));
    assert!(!verify(&plan, &memory, None, false).unwrap().equal);
    file.write_all_at(&[machine.memory[5000]], 5000).unwrap();
    assert!(verify(&plan, &memory, None, false).unwrap().equal);
    file.set_len(UNIT_BYTES).unwrap();
    let memory = FinalMemory::open(&files).unwrap();
    assert!(matches!(verify(&plan, &memory, None, false), Err(VerifyError::Short { .. })));
}

#[test]
fn differences_around_the_hole_and_outside_are_found() {
    let test = TestDisk::new();
    let disk = test.fresh();
    let params = PlanParams { vm_bytes: 5 << 30, ..full_params(6) };
    let plan = Plan::new(params, Some(&test.pristine)).unwrap();
    let mut machine = Machine::new(&plan, Some(&disk), 1);
    machine.run();
    let disks = Disks { pristine: &test.pristine, disk: &disk };
    let files = files_of(&plan, &machine.memory);
    let differences = |untouched| {
        let memory = FinalMemory::open(&files).unwrap();
        let verdict = verify(&plan, &memory, Some(disks), untouched).unwrap();
        assert_eq!(verdict.equal, verdict.difference_count == 0);
        verdict.differences
    };
    assert!(differences(true).is_empty());
    // A byte in each window, which is reported at its guest address.
    for window in plan.windows().list() {
        let high = usize::from(window.packed >= LOW_MEMORY_END);
        let at = window.packed - LOW_MEMORY_END * high as u64 + 4095;
        let mut byte = [0];
        files[high].read_exact_at(&mut byte, at).unwrap();
        files[high].write_all_at(&[byte[0] ^ 1], at).unwrap();
        let found = differences(true);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].offset, plan.windows().guest_address(window.offset) + 4095);
        files[high].write_all_at(&byte, at).unwrap();
    }
    // Zeros outside: an error if that memory must be untouched, otherwise allowed.
    files[1].write_all_at(&[0; PAGE_BYTES], 1 << 30).unwrap();
    let found = differences(true);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].note.contains("no access has requested"), "{}", found[0]);
    assert!(differences(false).is_empty());
    // Any other value is an error.
    files[1].write_all_at(&[7], (1 << 30) + 9).unwrap();
    let found = differences(false);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].offset, found[0].bytes), ((5 << 30) + 9, 1));
}

#[test]
fn contradictory_parameters_are_refused() {
    let test = TestDisk::new();
    let refused = |change: &dyn Fn(&mut PlanParams)| {
        let mut params = full_params(1);
        change(&mut params);
        let error = Plan::new(params, Some(&test.pristine)).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    assert!(refused(&|p| p.memory_bytes = 5000).contains("memory_bytes"));
    assert!(refused(&|p| p.memory_bytes = UNIT_BYTES).contains("room"));
    assert!(refused(&|p| p.memory_bytes = 4 << 30).contains("memory_bytes"));
    assert!(refused(&|p| p.vm_bytes = 3 * UNIT_BYTES).contains("vm_bytes"));
    assert!(refused(&|p| p.vm_bytes = (5 << 30) + 4096).contains("vm_bytes"));
    assert!(refused(&|p| p.cpus = 0).contains("cpus"));
    let disk = |change: fn(&mut DiskParams)| refused(&|p| change(p.disk.as_mut().unwrap()));
    assert!(disk(|d| d.queues = 0).contains("queues"));
    assert!(disk(|d| d.queues = 1000).contains("rings"));
    assert!(disk(|d| d.queue_size = 100).contains("queue_size"));
    assert!(disk(|d| d.requests = 90).contains("requests"));
    assert!(disk(|d| (d.queues, d.requests) = (8, 300)).contains("room"));
    assert!(disk(|d| d.read_sectors = 1).contains("read_sectors"));
    assert!(disk(|d| d.disk_sectors = 10).contains("disk_sectors"));
    assert!(disk(|d| d.read_sectors = DISK_SECTORS * 1000).contains("disk_sectors"));
    assert!(matches!(Plan::new(full_params(1), None), Err(PlanError::NoPristine)));
    let mut params = full_params(1);
    params.disk.as_mut().unwrap().disk_sectors = 1 << 40;
    params.disk.as_mut().unwrap().read_sectors = 1 << 39;
    let error = Plan::new(params, Some(&test.pristine)).unwrap_err().to_string();
    assert!(error.contains("pristine"), "{error}");
}

/// All orders of arrival, on enough units; and plans of realistic sizes are generated quickly (the
/// limit is for a debug build on a busy machine).
#[test]
fn large_plans() {
    let test = TestDisk::new();
    let mut params = full_params(5);
    params.memory_bytes = 1 << 30;
    params.cpus = 8;
    params.touches_per_unit = 144;
    let disk = params.disk.as_mut().unwrap();
    (disk.queues, disk.queue_size, disk.requests) = (4, 1024, 1364);
    disk.disk_sectors = 1 << 30;
    let start = std::time::Instant::now();
    let plan = Plan::new(params, Some(&test.pristine)).unwrap();
    let took = start.elapsed();
    println!("{} touches, {} requests: {took:?}", plan.guest_touches(), plan.requests().len());
    assert!(took.as_secs() < 20);
    assert!(plan.guest_touches() >= 65536);
    let mut arrivals: HashMap<String, u64> = HashMap::new();
    for arrival in plan.arrivals() {
        *arrivals.entry(format!("{arrival:?}")).or_default() += 1;
    }
    assert_eq!(arrivals.len(), 7);
    assert!(arrivals.values().all(|&n| n >= 73), "{arrivals:?}");
}
