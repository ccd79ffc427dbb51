// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All KVM state of a VM, saved as JSON and restored in another VM. A KVM that emulates lacks much
//! of it; the lab has it.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use demand_kvm::{PlainSlot, VcpuKick, Virtualization, open_kvm, probe};
use demand_memory::{Mapping, PAGE_SIZE};
use demand_vmm::arch::cpuid::{check_kvm, for_vcpu, guest_cpuid};
use demand_vmm::arch::vcpu_state::{StateShape, VcpuState};
use demand_vmm::arch::vm_state::VmState;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, Msrs, Xsave, kvm_clock_data,
    kvm_irqchip, kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use serde_json::{Value, json};
use test_support::host::skip;
use test_support::wait::PATIENCE;
use vm_memory::GuestAddress;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
const LSTAR: u32 = 0xc000_0082;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const WALL_CLOCK: u32 = 0x4b56_4d00;

/// Guest physical addresses at which KVM writes the time.
const CLOCK_AT: u64 = 0x2000;
const WALL_CLOCK_AT: u64 = 0x3100;
/// Guest physical address of the processor's state in system management mode, unless a guest moves
/// it.
const SMM_STATE_AT: u64 = 0x3_f000;

/// A VM with two vCPUs, and with memory at address 0.
struct Rig {
    // The vCPUs are dropped before the memory and the VM that they run on.
    vcpus: Vec<VcpuFd>,
    _memory: PlainSlot,
    file: File,
    shape: StateShape,
    vm: Arc<VmFd>,
}

impl Rig {
    fn new(kvm: &Kvm) -> Self {
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let size = 16 * PAGE_SIZE;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let mapping = Arc::new(Mapping::shared(&file, size).unwrap());
        let memory = PlainSlot::new(vm.clone(), 0, GuestAddress(0), mapping).unwrap();
        let vcpus = (0..2).map(|cpu| vm.create_vcpu(cpu).unwrap()).collect();
        let shape = StateShape::of(kvm, &vm).unwrap();
        Rig { vcpus, _memory: memory, file, shape, vm }
    }

    fn save(&self) -> Saved {
        let vcpus = self.vcpus.iter().zip(0..);
        let vcpus = vcpus.map(|(vcpu, cpu)| VcpuState::save(cpu, vcpu, &self.shape).unwrap());
        // The states pass through JSON.
        let vcpus = vcpus.map(|state| serde_json::to_string(&state).unwrap()).collect();
        Saved { vcpus, vm: serde_json::to_string(&VmState::save(&self.vm).unwrap()).unwrap() }
    }

    fn restore(&self, saved: &Saved) {
        let vm: VmState = serde_json::from_str(&saved.vm).unwrap();
        vm.restore_clock(&self.vm).unwrap();
        for ((vcpu, cpu), state) in self.vcpus.iter().zip(0..).zip(&saved.vcpus) {
            let state: VcpuState = serde_json::from_str(state).unwrap();
            state.restore(cpu, vcpu, &self.shape).unwrap();
        }
        vm.restore(&self.vm).unwrap();
    }
}

struct Saved {
    vcpus: Vec<String>,
    vm: String,
}

/// Opens KVM, if it can do what these tests need.
fn kvm() -> Option<Kvm> {
    let kvm = open_kvm().map_err(|error| skip(&error.to_string())).ok()?;
    if probe().virtualization == Virtualization::Emulated {
        skip("this KVM emulates, and keeps another state than it is given");
        return None;
    }
    Some(kvm)
}

fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 1, "MSR {index:#x}");
}

fn msr(vcpu: &VcpuFd, index: u32) -> u64 {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1, "MSR {index:#x}");
    msrs.as_slice()[0].data
}

/// Gives a vCPU values that a new vCPU does not have.
fn make_distinct(kvm: &Kvm, rig: &Rig, cpu: u32) {
    let vcpu = &rig.vcpus[cpu as usize];
    let id = u64::from(cpu);
    let told = for_vcpu(&guest_cpuid(kvm).unwrap(), cpu, 2);
    vcpu.set_cpuid2(&told).unwrap();
    vcpu.set_regs(&kvm_regs {
        rax: 0x1111_2222_3333_4444 + id,
        r15: 0x5555_6666_7777_8888 + id,
        rip: 0xffff_ffff_8100_0000 + id,
        rsp: 0xffff_c900_0000_0000 + id,
        rflags: 0x246,
        ..Default::default()
    })
    .unwrap();
    // Processors without XSAVE, such as the lab's, have none.
    let mut xcrs = vcpu.get_xcrs().unwrap();
    let has_xsave = xcrs.nr_xcrs > 0;
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.efer = 0xd01; // NX, LMA, LME, SCE
    sregs.cr0 = 0x8005_0033;
    sregs.cr2 = 0x1234_5678 + id;
    sregs.cr3 = 0x5000;
    sregs.cr4 = 0x6a0; // FPU, PGE, PAE
    sregs.cr4 |= if has_xsave { 1 << 18 } else { 0 }; // OSXSAVE
    (sregs.cs.l, sregs.cs.db) = (1, 0);
    (sregs.fs.base, sregs.gs.base) = (0x7f00_0000_1000 + id, 0xffff_8880_0000_0000 + id);
    sregs.cr8 = 5;
    vcpu.set_sregs(&sregs).unwrap();
    if has_xsave {
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs).unwrap();
    }
    set_xmm0(rig, vcpu, [0xabcd_ef01 + cpu, 2, 3, 4]);
    let mut debug = vcpu.get_debug_regs().unwrap();
    (debug.db[0], debug.dr7) = (0xffff_ffff_8123_4000 + id, 0x401);
    vcpu.set_debug_regs(&debug).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    let mut put = |register: usize, value: u32| {
        let bytes = value.to_le_bytes();
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(bytes) {
            *byte = value as std::ffi::c_char;
        }
    };
    put(0x80, 0x50); // TPR, which CR8 shows
    put(0xf0, 0x1ff); // SVR: enabled
    put(0x220, 1 << 1); // IRR: vector 0x41
    put(0x320, 0x4_0040); // the timer: TSC-deadline mode, vector 0x40
    vcpu.set_lapic(&lapic).unwrap();
    for (index, data) in [
        (0xc000_0081, 0x0023_0010_0000_0000), // STAR
        (LSTAR, 0xffff_ffff_8180_0000 + id),
        (0xc000_0102, 0xffff_8881_0000_0000 + id), // KERNEL_GS_BASE
        (0x176, 0xffff_ffff_8190_0000),            // SYSENTER_EIP
        (0x277, 0x0407_0506_0007_0106),            // PAT
        (0x2ff, 0x806),                            // MTRRdefType
        (0x200, 0x8000_0000),
        (0x201, 0x8000_0800),
        (TSC, 1_000_000_000_000),
        (TSC_DEADLINE, 1 << 50),
        (SYSTEM_TIME, CLOCK_AT + 64 * id + 1),
        (WALL_CLOCK, WALL_CLOCK_AT),
    ] {
        set_msr(vcpu, index, data);
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    (events.nmi.pending, events.nmi.masked) = (1, 1);
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    vcpu.set_vcpu_events(&events).unwrap();
    if cpu == 0 {
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
    }
}

fn set_xmm0(rig: &Rig, vcpu: &VcpuFd, value: [u32; 4]) {
    let bytes = rig.vm.check_extension_int(Cap::Xsave2) as usize;
    let more = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    let mut area = Xsave::new(more).unwrap();
    // SAFETY: the area has the length that KVM reported, and the call writes no more.
    unsafe { vcpu.get_xsave2(&mut area) }.unwrap();
    // SAFETY: this does not change the structure's length field.
    let head = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    head[40..44].copy_from_slice(&value);
    head[128] |= 0b11; // The states of the FPU and of SSE are present.
    // SAFETY: the area has the length that KVM reported, and the call reads no more.
    unsafe { vcpu.set_xsave2(&area) }.unwrap();
}

/// Returns a vCPU's state without its TSC, and the TSC.
fn without_tsc(state: &str) -> (Value, u64) {
    let mut state: Value = serde_json::from_str(state).unwrap();
    let msrs = state["msrs"].as_array_mut().unwrap();
    let at = msrs.iter().position(|msr| msr[0] == TSC).unwrap();
    let tsc = msrs.remove(at)[1].as_u64().unwrap();
    (state, tsc)
}

/// Returns an interrupt controller's state without the requests that the timer's ticks make at any
/// moment: of interrupt 0, and of the I/O APIC's pins 0 and 2.
fn without_ticks(name: &str, chip: &Value) -> Vec<u8> {
    const HEADER: usize = 8;
    let hex = chip.as_str().unwrap();
    let digits = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16));
    let mut bytes: Vec<u8> = digits.map(Result::unwrap).collect();
    match name {
        // The edge that was seen last, and the requests.
        "pic_master" => bytes[HEADER..HEADER + 2].iter_mut().for_each(|byte| *byte &= !1),
        // The requests.
        "ioapic" => bytes[HEADER + 16] &= !0b101,
        _ => {}
    }
    bytes
}

#[test]
fn all_of_it_comes_back() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::new(&kvm);
    make_distinct(&kvm, &rig, 0);
    make_distinct(&kvm, &rig, 1);
    let hour = 3_600_000_000_000;
    rig.vm.set_clock(&kvm_clock_data { clock: hour, ..Default::default() }).unwrap();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    rig.vm.get_irqchip(&mut chip).unwrap();
    chip.chip.pic.imr = 0x5a;
    rig.vm.set_irqchip(&chip).unwrap();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    rig.vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: all bytes are valid values of this member.
    unsafe { chip.chip.ioapic.redirtbl[4].bits = 0x0100_0000_0001_0034 };
    rig.vm.set_irqchip(&chip).unwrap();
    let mut pit = rig.vm.get_pit2().unwrap();
    (pit.channels[0].mode, pit.channels[0].count) = (2, 0x1234);
    rig.vm.set_pit2(&pit).unwrap();

    let saved = rig.save();
    let other = Rig::new(&kvm);
    other.restore(&saved);
    let now = other.save();
    // KVM gives TSCs that are set one after the other the first one's offset, so a vCPU that was
    // saved later may read less than it had.
    let lowest = saved.vcpus.iter().map(|state| without_tsc(state).1).min().unwrap();
    for (saved, now) in saved.vcpus.iter().zip(&now.vcpus) {
        let ((saved, tsc), (now, later)) = (without_tsc(saved), without_tsc(now));
        // The offset from the host's TSC follows from the TSC.
        let all = saved.as_object().unwrap().iter().filter(|(name, _)| *name != "tsc_offset");
        for (name, value) in all {
            assert_eq!(&now[name], value, "{name}");
        }
        assert!(tsc > 1_000_000_000_000 && later > lowest, "{lowest} {tsc} {later}");
    }
    let [vm, other_vm]: [Value; 2] =
        [&saved.vm, &now.vm].map(|json| serde_json::from_str(json).unwrap());
    for name in ["pic_master", "pic_slave", "ioapic"] {
        let [before, after] = [&vm, &other_vm].map(|state| without_ticks(name, &state[name]));
        assert_eq!(before, after, "{name}");
    }
    let [clock, later] = [&vm, &other_vm].map(|state| state["clock"].as_u64().unwrap());
    let a_minute = 60_000_000_000;
    assert!((hour..hour + a_minute).contains(&clock) && (clock..clock + a_minute).contains(&later));
    let pit = other.vm.get_pit2().unwrap().channels[0];
    assert_eq!((pit.mode, pit.count), (2, 0x1234));

    // The state also reads back through the counterparts of the calls that set it.
    let vcpus = &other.vcpus;
    assert_eq!(vcpus[1].get_regs().unwrap().rax, 0x1111_2222_3333_4445);
    assert_eq!(vcpus[0].get_sregs().unwrap().fs.base, 0x7f00_0000_1000);
    assert_eq!(vcpus[0].get_xsave().map_or(0, |area| area.region[40]), 0xabcd_ef01);
    assert_eq!(vcpus[1].get_debug_regs().unwrap().db[0], 0xffff_ffff_8123_4001);
    assert_eq!(msr(&vcpus[1], LSTAR), 0xffff_ffff_8180_0001);
    assert_eq!(msr(&vcpus[0], TSC_DEADLINE), 1 << 50);
    assert_eq!(msr(&vcpus[0], 0x201), 0x8000_0800);
    assert_eq!(vcpus[0].get_vcpu_events().unwrap().nmi.pending, 1);
    assert_eq!(vcpus[0].get_mp_state().unwrap().mp_state, KVM_MP_STATE_HALTED);
    assert_eq!(vcpus[1].get_mp_state().unwrap().mp_state, KVM_MP_STATE_UNINITIALIZED);
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    other.vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: all bytes are valid values of this member.
    assert_eq!(unsafe { chip.chip.pic.imr }, 0x5a);

    // The host passes the check, and the pages that KVM accesses are known.
    let state: VcpuState = serde_json::from_str(&saved.vcpus[1]).unwrap();
    check_kvm(&[state.guest_cpuid().unwrap()], &kvm).unwrap();
    let pages = [CLOCK_AT, WALL_CLOCK_AT & !0xfff, SMM_STATE_AT].map(GuestAddress);
    assert_eq!(state.own_pages(), pages);
    // The wall clock at the guest's start plus the guest's time is the present time.
    let mut wall = [0; 8];
    other.file.read_exact_at(&mut wall, WALL_CLOCK_AT).unwrap();
    let seconds = u64::from(u32::from_le_bytes(wall[4..].try_into().unwrap()));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!((seconds + clock / 1_000_000_000).abs_diff(now) < 60, "{seconds} {clock} {now}");
}

/// Also where KVM emulates, and shows features that it does not list.
#[test]
fn cpuid_is_accepted_by_its_own_host() {
    let kvm = match open_kvm() {
        Ok(kvm) => kvm,
        Err(error) => return skip(&error.to_string()),
    };
    let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&for_vcpu(&guest_cpuid(&kvm).unwrap(), 0, 1)).unwrap();
    check_kvm(&[vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap()], &kvm).unwrap();
}

/// Guest physical addresses of real-mode code that waits for an interrupt, and of its handler.
const WAIT: u64 = 0x1000;
const HANDLER: u64 = 0x1100;
const PORT: u16 = 0x90;

/// A local APIC accepts a deadline of its timer only in the mode that waits for one.
#[test]
fn armed_timer_fires_in_the_restored_guest() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::new(&kvm);
    let vcpu = &rig.vcpus[0];
    vcpu.set_cpuid2(&for_vcpu(&guest_cpuid(&kvm).unwrap(), 0, 2)).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: WAIT, rsp: 0x8000, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    for (register, value) in [(0xf0, 0x1ffu32), (0x320, 0x4_0040)] {
        for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + index] = byte as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).unwrap();
    let soon = u64::from(vcpu.get_tsc_khz().unwrap()) * 300;
    set_msr(vcpu, TSC_DEADLINE, msr(vcpu, TSC) + soon);
    let saved = rig.save();

    let mut other = Rig::new(&kvm);
    for (at, bytes) in [
        (WAIT, &[0xfb, 0xf4, 0xeb, 0xfd][..]), // sti; hlt; jmp to the hlt
        (HANDLER, &[0xe6, PORT as u8, 0xf4]),  // out PORT, al; hlt
        (4 * 0x40, &[0x00, 0x11, 0x00, 0x00]),
    ] {
        other.file.write_all_at(bytes, at).unwrap();
    }
    other.restore(&saved);
    let vcpu = &mut other.vcpus[0];
    let kick = VcpuKick::new(vcpu).unwrap();
    kick.attach();
    let late = kick.clone();
    thread::spawn(move || {
        thread::sleep(PATIENCE);
        late.kick();
    });
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, _)) => {}
        other => panic!("the timer did not go off: {other:?}"),
    }
}

#[test]
fn unusable_state_is_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::new(&kvm);
    make_distinct(&kvm, &rig, 0);
    let saved: Value = serde_json::from_str(&rig.save().vcpus[0]).unwrap();
    type Change<'a> = &'a dyn Fn(&mut Value);
    let refused = |change: Change<'_>| {
        let mut state = saved.clone();
        change(&mut state);
        let state: VcpuState = match serde_json::from_value(state) {
            Ok(state) => state,
            Err(error) => return error.to_string(),
        };
        let other = Rig::new(&kvm);
        state.restore(7, &other.vcpus[0], &other.shape).unwrap_err().to_string()
    };
    let leaves = saved["cpuid"].as_array().unwrap().clone();
    let a_bad_address = |state: &mut Value| {
        let msrs = state["msrs"].as_array_mut().unwrap();
        let msr = msrs.iter_mut().find(|msr| msr[0] == LSTAR).unwrap();
        msr[1] = json!(1u64 << 62);
    };
    let cases: [(Change<'_>, &str); 6] = [
        (&a_bad_address, "vCPU 7: KVM refuses MSR 0xc0000082"),
        (&|state| state["cpuid"] = json!([&leaves[..]; 9].concat()), "vCPU 7, its CPUID"),
        (&|state| state["regs"] = json!("00ff"), "2 bytes where this version has 144"),
        (&|state| state["regs"] = json!("zz"), "hexadecimal"),
        (&|state| state["xsave"] = json!("01".repeat(100_000)), "vCPU 7: its FPU state"),
        (&|state| state["mp_state"] = json!("ff000000"), "vCPU 7, its MP state"),
    ];
    for (change, says) in cases {
        let error = refused(change);
        assert!(error.contains(says) && !error.contains('\n'), "{error}");
    }
    let error = refused(&|state| state["mp_state"] = json!("ff000000"));
    assert!(error.contains("the snapshot may be damaged"), "{error}");
    // A vCPU of a VM without interrupt controllers has no state of a local APIC.
    let bare = kvm.create_vm().unwrap();
    let vcpu = bare.create_vcpu(0).unwrap();
    let shape = StateShape::of(&kvm, &bare).unwrap();
    let error = VcpuState::save(3, &vcpu, &shape).unwrap_err().to_string();
    assert!(error.contains("save vCPU 3, its local APIC"), "{error}");
    let error = VmState::save(&bare).err().unwrap().to_string();
    assert!(error.contains("interrupt controller"), "{error}");
}
