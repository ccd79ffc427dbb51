// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod abi;
mod attributes;
mod engine;
mod fault;
mod kick;
mod memslot;
mod open;
mod plain;
mod probe;
mod slot;
mod trap;
mod trial;

pub use abi::{KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};
pub use engine::{Engine, EngineChoice, EngineError, UnknownEngine, resolve};
pub use fault::{FaultError, FaultHandler, RegionsOverlap};
pub use kick::{KickError, VcpuKick};
pub use memslot::SlotError;
pub use open::{KvmError, open_kvm};
pub use plain::PlainSlot;
pub use probe::{EngineReport, KvmFeatures, Probe, Virtualization, probe};
pub use slot::{DemandSlot, Finished};
pub use trial::Trial;
