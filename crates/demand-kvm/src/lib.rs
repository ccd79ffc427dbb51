// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod abi;
mod attributes;
mod engine;
mod fault;
mod features;
mod kick;
mod memslot;
#[cfg(target_arch = "x86_64")]
mod msr;
#[cfg(target_arch = "x86_64")]
mod nested;
mod open;
#[cfg(target_arch = "x86_64")]
mod own_pages;
mod pending;
mod plain;
mod probe;
mod scratch;
mod slot;
mod trap;
mod trial;
mod vcpu;

pub use abi::{KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};
pub use engine::{Engine, EngineChoice, EngineError, UnknownEngine, resolve};
pub use fault::{FaultError, FaultHandler, RegionsOverlap};
pub use features::KvmFeatures;
pub use kick::{KickError, VcpuKick};
pub use memslot::SlotError;
#[cfg(target_arch = "x86_64")]
pub use msr::{MsrTrap, MsrTrapError};
#[cfg(target_arch = "x86_64")]
pub use nested::hide_nested;
pub use open::{KvmError, open_kvm};
#[cfg(target_arch = "x86_64")]
pub use own_pages::own_pages;
pub use pending::Pending;
pub use plain::PlainSlot;
pub use probe::{EngineReport, Probe, Virtualization, probe};
pub use slot::{DemandSlot, Finished};
pub use trial::Trial;
pub use vcpu::{DemandVcpu, Settle, Step, StepError};
