// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The x86_64 boot protocol, memory layout, CPUID, ACPI and KVM state. The PC's devices are in
//! `devices`.

pub(crate) mod acpi;
pub(crate) mod boot_cpu;
pub(crate) mod boot_files;
pub(crate) mod boot_part;
pub(crate) mod boot_room;
pub mod cpuid;
pub mod error;
pub(crate) mod hex;
pub mod layout;
pub(crate) mod loader;
pub mod placement;
pub(crate) mod sregs2;
pub(crate) mod tsc;
pub mod vcpu_state;
pub mod vm_state;
