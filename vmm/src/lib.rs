// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod acpi;
pub mod bench;
pub mod boot;
pub mod boot_cpu;
pub mod cli;
pub mod cpuid;
pub mod device_kind;
pub mod device_state;
pub mod disk;
pub mod error;
mod gate;
mod hex;
mod interrupt;
pub mod layout;
pub mod machine;
pub mod notify;
pub mod options;
pub mod placement;
pub mod power;
pub mod probe;
pub mod report;
pub mod run;
pub mod serial;
mod sregs2;
pub mod test_exits;
pub mod timeline;
pub mod vcpu;
pub mod vcpu_state;
pub mod vcpus;
pub mod vm_state;
pub mod vhost_user;
pub mod virtio_mmio;
mod vsock;
mod watch;
