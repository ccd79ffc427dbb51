// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::sync::Arc;

use demand_memory::{GuestMapping, Mapping, Pager, VcpuTrap};

fn guest(pager: &Arc<Pager>, mapping: Arc<Mapping>) -> GuestMapping {
    GuestMapping::armed(pager, mapping, VcpuTrap::Mapping).unwrap()
}

fn main() {}
