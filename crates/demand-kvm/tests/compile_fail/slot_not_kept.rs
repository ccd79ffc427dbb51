// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![deny(unused_must_use)]

use demand_kvm::{DemandSlot, DemandSlotConfig};

fn slot(config: DemandSlotConfig) {
    DemandSlot::new(config).unwrap();
}

fn main() {}
