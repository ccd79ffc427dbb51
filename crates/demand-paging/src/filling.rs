// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background fill of a memory whose regions come and go.

use std::sync::{Arc, Weak};

use demand_memory::{DemandMemory, Fill, FillOptions, FillOrder, FillRange, Pager};

use crate::Error;

/// Background fill, while it is wanted.
#[derive(Debug)]
pub(crate) struct Filling {
    fill: Fill,
    /// The options. Their ranges name regions by their index in `pagers`.
    options: FillOptions,
    pagers: Vec<Weak<Pager>>,
}

impl Filling {
    /// Starts to fill the memory.
    pub(crate) fn start(memory: &DemandMemory, options: FillOptions) -> Result<Self, Error> {
        let pagers: Vec<_> = memory.pagers().cloned().collect();
        let known = pagers.iter().map(Arc::downgrade).collect();
        let fill = Fill::start(pagers, options.clone());
        let fill = fill.map_err(|source| Error::Thread { duty: "fill memory", source })?;
        Ok(Filling { fill, options, pagers: known })
    }

    pub(crate) fn fill(&self) -> &Fill {
        &self.fill
    }

    /// Starts to fill other memory in the same way.
    pub(crate) fn again(&self, memory: &DemandMemory) -> Result<Self, Error> {
        let mut options = self.options.clone();
        if let FillOrder::RangesFirst(ranges) | FillOrder::RangesOnly(ranges) = &mut options.order {
            let index = |region: usize| {
                let before = self.pagers.get(region)?;
                memory.pagers().position(|pager| std::ptr::eq(Arc::as_ptr(pager), before.as_ptr()))
            };
            *ranges = std::mem::take(ranges)
                .into_iter()
                .filter_map(|range| Some(FillRange { region: index(range.region)?, ..range }))
                .collect();
        }
        Self::start(memory, options)
    }
}
