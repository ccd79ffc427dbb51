// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod armed;
mod deferred;
mod error;
mod event;
mod fault;
mod flags;
mod gfn;
mod guest;
mod lazy_map;
mod load;
mod markers;
mod open;
mod own_faults;
mod own_guard;
mod pending;
mod probe;
mod read;
mod service;
mod service_options;
mod spin;
mod uffd_entry;
mod userfaultfd;
mod watch;

pub use self::{
    armed::ArmedMapping,
    error::{Cause, OpenError, RangeError, ServiceError},
    event::Event,
    flags::{Features, Modes},
    guest::ArmGuestError,
    lazy_map::{LazyMap, LazyMapError, LazyMapOptions},
    load::{LoaderError, UnitLoader},
    open::{Access, make_room_for_descriptors},
    own_faults::OwnFaults,
    probe::{Answer, Probe, probe, probe_user_mode},
    service::FaultService,
    service_options::{DEFAULT_SPIN, DEFAULT_THREADS, ServiceCounts, ServiceOptions},
    userfaultfd::Userfaultfd,
};
