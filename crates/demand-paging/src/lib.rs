// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

#[cfg(feature = "vhost")]
mod back_end;
mod builder;
mod completion;
mod current;
mod error;
mod filling;
mod hotplug;
mod kvm_waits;
mod lazy;
mod memory;
#[cfg(not(feature = "vhost"))]
mod no_back_end;
mod trial;
mod vcpu;
mod vcpus;
mod vm;

pub use demand_kvm;
pub use demand_memory;
pub use demand_source;
pub use demand_uffd;
#[cfg(feature = "vhost")]
pub use demand_vhost;

pub use demand_kvm::{CompleteIo, Engine, EngineChoice, Step};
pub use demand_memory::{BackingKind, DemandMemory, FillRate};
pub use demand_uffd::ServiceOptions;

pub use self::{
    builder::LazyBuilder,
    current::{AddressSpace, MemoryGuard},
    error::Error,
    hotplug::LazyRegion,
    lazy::{Lazy, ParseLazyError},
    memory::LazyMemory,
    trial::try_markers,
    vcpu::LazyVcpu,
    vm::LazyVm,
};
