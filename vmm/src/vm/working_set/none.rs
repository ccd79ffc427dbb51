// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Working sets in a build without them: no VM has one.

use std::sync::Arc;

use demand_memory::{DemandMemory, FillOptions};
use demand_source::PageSource;

use crate::arch::placement::Placement;
use crate::config::WorkingSetConfig;
use crate::config::source::SnapshotPlace;
use crate::error::Error;
use crate::report::WorkingSetReport;
use crate::snapshot::open::OpenSnapshot;
use crate::vm::restore::RestoreError;

/// The working set of a VM, which no VM has.
#[derive(Debug)]
pub(crate) enum WorkingSetRun {}

impl WorkingSetRun {
    pub(crate) fn open(
        _: &WorkingSetConfig,
        _: (&OpenSnapshot, &SnapshotPlace),
        _: ([u8; 16], u64),
        _: Arc<dyn PageSource>,
    ) -> Result<Arc<Self>, Error> {
        Err(RestoreError::NoWorkingSets.into())
    }

    pub(crate) fn source(&self) -> Arc<dyn PageSource> {
        match *self {}
    }

    pub(crate) fn note(&self, _: &DemandMemory, _: &[Placement]) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn fill(&self, _: Option<FillOptions>, _: &[Placement]) -> Option<FillOptions> {
        match *self {}
    }

    pub(crate) fn begin(self: &Arc<Self>) -> Result<(), Error> {
        match **self {}
    }

    pub(crate) fn end(&self) {
        match *self {}
    }

    pub(crate) fn report(&self) -> WorkingSetReport {
        match *self {}
    }
}
