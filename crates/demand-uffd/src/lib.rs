// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod armed;
mod error;
mod event;
mod flags;
mod guest;
mod load;
mod probe;
mod service;
mod userfaultfd;
mod watch;

pub use self::{
    armed::{ArmedMapping, BACK_END_CHUNK},
    error::{Cause, OpenError, RangeError, ServiceError},
    event::Event,
    flags::{Features, Modes},
    guest::ArmGuestError,
    load::{LoaderError, UnitLoader},
    probe::{Access, Answer, Probe, probe},
    service::{DEFAULT_THREADS, FaultService},
    userfaultfd::Userfaultfd,
};
