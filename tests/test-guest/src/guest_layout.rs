// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test guest's address space, and the initial state of its vCPUs.
//!
//! | guest virtual | content |
//! |---|---|
//! | 0 up to [`LOW_MEMORY_END`] | the memory under test, mapped by [windows](crate::windows) |
//! | [`MMIO_ADDRESS`] | virtio-mmio devices, 4 KiB each, at the same physical address |
//! | [`CONTROL_ADDRESS`] | the control region: plain memory, always present |
//!
//! The control region has the same physical address, or one above the VM's memory if that extends
//! further.
//!
//! It holds page tables, the interpreter, stacks, result blocks, flags and the programs: a guest
//! that waits for a page of the memory under test needs no other page of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bare_guest::assembler::IcedError;
use bare_guest::{LARGE_PAGE, Mode, PageTables, cpuid, start_at};
use demand_kvm::hide_nested;
use demand_memory::{Mapping, to_usize};
use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use kvm_ioctls::{Kvm, VcpuFd};

pub use crate::addresses::{BLK_QUEUE_NOTIFY, CONTROL_ADDRESS, MAX_CPUS, MMIO_ADDRESS};

use crate::guest_code::{
    END, RESULT_ADDRESS, RESULT_BYTES, RESULT_EXPECTED, RESULT_FOUND, RESULT_STATE, RESULT_STEP,
    STEP_BYTES, assemble, encode,
};
use crate::plan::Plan;
use crate::windows::{LOW_MEMORY_END, Windows, guest_address};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;

// Space for page tables: one of level 4, one of level 3, and of level 2 one for each GiB below the
// limit of memory, one for the devices and one for the control region.
const TABLES: u64 = 2 + LOW_MEMORY_END / GIB + 2;

// Offsets in the control region.
const CODE: u64 = TABLES * PAGE;
const HANDLERS: u64 = CODE + PAGE;
const RESULTS: u64 = HANDLERS + PAGE;
const STACKS: u64 = RESULTS + PAGE;
const STACK_BYTES: u64 = 512;
const FLAGS: u64 = STACKS + MAX_CPUS as u64 * STACK_BYTES;

/// The layout of one plan's control region.
#[derive(Clone, Debug)]
pub struct GuestLayout {
    flags: usize,
    windows: Windows,
    /// Guest physical address of the control region.
    address: u64,
    /// Offset of each vCPU's program.
    programs: Vec<u64>,
    size: u64,
    entry: u64,
}

/// A vCPU's progress, as reported by the vCPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CpuResult {
    /// [`RUNNING`](crate::guest_code::RUNNING), [`DONE`](crate::guest_code::DONE),
    /// [`FAILED`](crate::guest_code::FAILED) or [`WAITING`](crate::guest_code::WAITING).
    pub state: u64,
    /// Index of the step in its program.
    pub step: usize,
    /// Address in the step, guest virtual.
    pub address: u64,
    /// The expected value.
    pub expected: u64,
    /// The value found.
    pub found: u64,
}

/// Errors of the test guest's setup.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// No memory for the control region.
    #[error(
        "cannot map {size} bytes for the test guest's control region: {source}; free some memory"
    )]
    Map {
        /// Its size in bytes.
        size: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The programs are too long.
    #[error(
        "cannot lay out the test guest's control region: it would have {size} bytes, and 1 GiB is \
         the most; ask for fewer touches"
    )]
    TooLarge {
        /// The resulting size in bytes.
        size: u64,
    },
    /// The guest cannot address all of the memory.
    #[error(
        "cannot run the test guest in memory that ends, with its control region, at guest address \
         {end:#x}: this KVM's vCPUs have {bits} bits of physical address; ask for less memory"
    )]
    OutOfReach {
        /// Guest physical address behind the control region.
        end: u64,
        /// Number of bits in a physical address.
        bits: u32,
    },
    /// The interpreter cannot be assembled.
    #[error("cannot assemble the test guest's code: {0}; this is a mistake in the program")]
    Assemble(#[from] IcedError),
    /// KVM refused part of a vCPU's state.
    #[error("cannot {what} of vCPU {cpu}: {source}; check that /dev/kvm is that of an x86_64 host")]
    Kvm {
        /// The operation.
        what: &'static str,
        /// Index of the vCPU.
        cpu: usize,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

impl GuestLayout {
    /// Computes the layout for `plan`.
    ///
    /// # Errors
    /// If the programs are too long.
    pub fn new(plan: &Plan) -> Result<Self, LayoutError> {
        let mut end = (FLAGS + 8 * plan.flags() as u64).next_multiple_of(PAGE);
        let mut programs = Vec::new();
        for cpu in 0..plan.params().cpus as usize {
            programs.push(end);
            let steps = plan.program(cpu).len() as u64 + 1;
            end = (end + steps * STEP_BYTES).next_multiple_of(PAGE);
        }
        let size = end.next_multiple_of(LARGE_PAGE);
        if size > GIB {
            return Err(LayoutError::TooLarge { size });
        }
        Ok(GuestLayout {
            flags: plan.flags(),
            windows: plan.windows().clone(),
            address: control_address(plan.windows().vm_bytes()),
            programs,
            size,
            entry: assemble(CONTROL_ADDRESS + CODE)?.entry,
        })
    }

    /// Returns the size of the control region in bytes, a multiple of 2 MiB.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the guest physical address of the control region.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the guest virtual address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// Fills the control region.
    fn fill(&self, plan: &Plan, control: &[AtomicU64]) -> Result<(), LayoutError> {
        let put = |offset: u64, value: u64| {
            control[(offset / 8) as usize].store(value, Ordering::Relaxed);
        };
        for (address, entry) in self.page_tables().entries() {
            put(address - self.address, entry);
        }
        let code = assemble(CONTROL_ADDRESS + CODE)?;
        for (i, bytes) in code.code.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            put(CODE + 8 * i as u64, u64::from_le_bytes(word));
        }
        for (i, &handler) in code.handlers.iter().enumerate() {
            put(HANDLERS + 8 * i as u64, handler);
        }
        for (cpu, &start) in self.programs.iter().enumerate() {
            let mut offset = start;
            let steps = plan.program(cpu).iter();
            let encoded =
                steps.map(|step| encode(step, |f| CONTROL_ADDRESS + FLAGS + 8 * f as u64));
            for step in encoded.chain([END]) {
                for (i, word) in step.into_iter().enumerate() {
                    put(offset + 8 * i as u64, word);
                }
                offset += STEP_BYTES;
            }
        }
        Ok(())
    }

    /// Returns the page tables, at the start of the control region. They map only what exists.
    fn page_tables(&self) -> PageTables {
        let mut tables = PageTables::new(self.address);
        for offset in (0..self.windows.memory_bytes()).step_by(to_usize(LARGE_PAGE)) {
            tables.map(offset..offset + LARGE_PAGE, self.windows.guest_address(offset));
        }
        tables.map(MMIO_ADDRESS..MMIO_ADDRESS + LARGE_PAGE, MMIO_ADDRESS);
        tables.map(CONTROL_ADDRESS..CONTROL_ADDRESS + self.size, self.address);
        assert!(tables.size() <= CODE, "they fit before the code");
        tables
    }

    /// Puts a vCPU at the start of its program. It needs no interrupt controller; with one in KVM
    /// it runs without waiting for another vCPU to start it.
    ///
    /// Its CPUID is the one that KVM supports, without SVM and VMX.
    ///
    /// # Errors
    /// If KVM refuses, or its vCPUs cannot address that much memory.
    pub fn setup_vcpu(&self, kvm: &Kvm, vcpu: &VcpuFd, cpu: usize) -> Result<(), LayoutError> {
        let refused = |what| move |source| LayoutError::Kvm { what, cpu, source };
        let number = u32::try_from(cpu).expect("there are at most MAX_CPUS");
        let mut cpuid = cpuid(kvm, number).map_err(refused("get the CPUID"))?;
        // Nested guests must not be able to read missing pages.
        hide_nested(&mut cpuid);
        let (end, bits) = (self.address + self.size, physical_bits(&cpuid));
        if end.checked_shr(bits).unwrap_or(0) > 0 {
            return Err(LayoutError::OutOfReach { end, bits });
        }
        vcpu.set_cpuid2(&cpuid).map_err(refused("set the CPUID"))?;
        let mode = Mode::Long { page_tables: self.address };
        mode.set(vcpu).map_err(refused("set the special registers"))?;
        vcpu.set_regs(&kvm_regs {
            rsp: CONTROL_ADDRESS + STACKS + (cpu as u64 + 1) * STACK_BYTES,
            rdi: CONTROL_ADDRESS + self.programs[cpu],
            rsi: CONTROL_ADDRESS + HANDLERS,
            rbp: CONTROL_ADDRESS + RESULTS + cpu as u64 * RESULT_BYTES,
            ..start_at(self.entry)
        })
        .map_err(refused("set the registers"))?;
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
            .map_err(refused("start the run"))
    }
}

/// Returns the guest physical address of the control region for a VM with `vm_bytes` bytes of
/// memory.
fn control_address(vm_bytes: u64) -> u64 {
    CONTROL_ADDRESS.max((guest_address(vm_bytes - 1) + 1).next_multiple_of(GIB))
}

/// Returns the number of physical address bits of a vCPU with this CPUID (AMD64 manual, volume 3,
/// Fn8000_0008).
fn physical_bits(cpuid: &CpuId) -> u32 {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    entry.map(|entry| entry.eax & 0xff).filter(|&bits| bits > 0).unwrap_or(36)
}

/// The control region, in separate memory. The guest uses it while it runs.
#[derive(Debug)]
pub struct ControlMemory {
    layout: GuestLayout,
    mapping: Arc<Mapping>,
}

impl ControlMemory {
    /// Maps anonymous memory and fills it with the guest's code and data for `plan`.
    ///
    /// # Errors
    /// If no memory is available, or the programs are too long.
    pub fn new(plan: &Plan) -> Result<Self, LayoutError> {
        let layout = GuestLayout::new(plan)?;
        let size = layout.size;
        let mapping =
            Mapping::anonymous(size).map_err(|source| LayoutError::Map { size, source })?;
        let control = ControlMemory { layout, mapping: Arc::new(mapping) };
        control.layout.fill(plan, control.words())?;
        Ok(control)
    }

    /// Returns the layout of the region.
    pub fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// Returns its mapping in this process, for the memslot at the layout's
    /// [address](GuestLayout::address).
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Returns the address of the mapping.
    pub fn host_address(&self) -> u64 {
        self.mapping.address().as_ptr() as u64
    }

    /// Returns its size in bytes.
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has that many bytes, readable and writable as long as `self` lives;
        // it is aligned to pages and every bit pattern is valid. All access to it is through
        // atomics.
        unsafe {
            std::slice::from_raw_parts(
                self.mapping.address().cast().as_ptr(),
                (self.size() / 8) as usize,
            )
        }
    }

    /// Returns the flags, which vCPUs and the VMM's part of the plan wait for and set.
    pub fn flags(&self) -> &[AtomicU64] {
        &self.words()[(FLAGS / 8) as usize..][..self.layout.flags]
    }

    /// Returns the progress of vCPU `cpu`. It is consistent once the vCPU has reported its end.
    pub fn result(&self, cpu: usize) -> CpuResult {
        let word = |offset: u64| {
            let at = RESULTS + cpu as u64 * RESULT_BYTES + offset;
            self.words()[(at / 8) as usize].load(Ordering::Acquire)
        };
        let state = word(RESULT_STATE);
        let start = CONTROL_ADDRESS + self.layout.programs[cpu];
        CpuResult {
            state,
            step: (word(RESULT_STEP).saturating_sub(start) / STEP_BYTES) as usize,
            address: word(RESULT_ADDRESS),
            expected: word(RESULT_EXPECTED),
            found: word(RESULT_FOUND),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanParams;

    #[test]
    fn the_control_region_makes_way_for_memory() {
        assert_eq!(control_address(2 << 20), CONTROL_ADDRESS);
        assert_eq!(control_address(59 * GIB), CONTROL_ADDRESS);
        assert_eq!(control_address(59 * GIB + LARGE_PAGE), CONTROL_ADDRESS + GIB);
        assert_eq!(control_address(500 * GIB), 501 * GIB);
    }

    /// Translates an address in each unit of the memory under test.
    #[test]
    fn page_tables_lead_to_the_windows() {
        for (memory_bytes, vm_bytes) in [(64 << 20, 0), (64 << 20, 5 * GIB), (GIB, 64 * GIB)] {
            let params = PlanParams { memory_bytes, vm_bytes, ..PlanParams::default() };
            let plan = Plan::new(params, None).unwrap();
            let layout = GuestLayout::new(&plan).unwrap();
            let tables = layout.page_tables();
            let physical = |address| tables.physical(address).unwrap();
            for unit in 0..memory_bytes / LARGE_PAGE {
                let offset = unit * LARGE_PAGE + 4096;
                assert_eq!(physical(offset), plan.windows().guest_address(offset));
            }
            assert_eq!(physical(MMIO_ADDRESS), MMIO_ADDRESS);
            assert_eq!(physical(CONTROL_ADDRESS), layout.address());
        }
    }
}
