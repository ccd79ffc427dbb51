// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small state for tests of snapshots.

use serde::{Deserialize, Serialize};

/// The state, whose text has what an encoder must escape.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    vcpus: Vec<Vcpu>,
    clock: u64,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Vcpu {
    rax: u64,
    name: String,
}

/// Returns a state of two vCPUs.
pub(super) fn machine() -> Machine {
    let vcpu = |rax| Vcpu { rax, name: "a \"},{ b".into() };
    Machine { vcpus: vec![vcpu(1), vcpu(2)], clock: 3 }
}
