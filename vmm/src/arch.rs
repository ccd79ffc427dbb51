// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that depends on x86_64: memory layout, boot protocol, CPUID, ACPI, and KVM state.

pub mod acpi;
pub mod boot_cpu;
pub(crate) mod boot_room;
pub mod cpuid;
pub(crate) mod hex;
pub mod layout;
pub mod loader;
pub mod placement;
pub(crate) mod sregs2;
pub(crate) mod tsc;
pub mod vcpu_state;
pub mod vm_state;
