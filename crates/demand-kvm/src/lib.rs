// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod abi;
mod attributes;
mod changes;
mod choice;
mod engine;
mod fault;
mod features;
mod found;
mod guest_memfd;
mod hotplug;
mod kick;
mod marker_faults;
mod marker_signal;
mod memslot;
#[cfg(target_arch = "x86_64")]
mod msr_filter;
#[cfg(target_arch = "x86_64")]
mod nested;
mod open;
#[cfg(target_arch = "x86_64")]
mod own_pages;
mod page_messages;
#[cfg(target_arch = "x86_64")]
mod page_tables;
mod pending;
mod plain;
mod probe;
mod probe_cache;
mod scratch;
mod slot;
mod slot_engine;
mod trial;
mod vcpu;

pub use abi::KVM_MEMORY_EXIT_FLAG_USERFAULT;
pub use choice::{EngineChoice, EngineError, ParseEngineChoiceError, resolve};
pub use engine::Engine;
pub use fault::{FaultError, FaultHandler, FaultRegion, RegionsOverlap};
pub use features::KvmFeatures;
pub use guest_memfd::{GUEST_MEMFD_LIMITS, guest_memfd};
pub use hotplug::InsertError;
pub use kick::{KickError, VcpuKick};
pub use marker_faults::MarkerFaults;
pub use memslot::SlotError;
#[cfg(target_arch = "x86_64")]
pub use msr_filter::{MsrFilter, MsrFilterError};
#[cfg(target_arch = "x86_64")]
pub use nested::hide_nested;
pub use open::{KvmError, open_kvm};
#[cfg(target_arch = "x86_64")]
pub use own_pages::own_pages;
pub use page_messages::{PageMessages, PageMessagesError};
pub use pending::PendingExit;
pub use plain::PlainSlot;
pub use probe::{EngineReport, Probe, Virtualization, probe, probe_for};
pub use probe_cache::ProbeCache;
#[doc(hidden)]
pub use scratch::scratch_vms;
pub use slot::{DemandSlot, DemandSlotConfig};
pub use trial::Trial;
pub use vcpu::{CompleteIo, DemandVcpu, Step, StepError};
