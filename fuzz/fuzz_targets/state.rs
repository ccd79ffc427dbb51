// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the state files of snapshots: arbitrary bytes, and arbitrary JSON under a valid header.
//! Each file is decoded or refused, and a changed bit is detected.
#![no_main]

use demand_vmm::snapshot::state_file::{StateError, decode, encode};
use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};

/// A structure shaped like a VM's state.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Machine {
    vcpus: Vec<Vcpu>,
    clock: Option<u64>,
    kind: Kind,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Vcpu {
    registers: [u64; 3],
    name: String,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Kind {
    Small,
    Large { size: i8 },
}

fuzz_target!(|bytes: &[u8]| {
    let refused = |error: StateError| assert!(!error.to_string().is_empty());
    let _ = decode::<Machine>(bytes).map_err(refused);
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
    let mut whole = encode(&json).unwrap();
    if let Ok(machine) = decode::<Machine>(&whole).map_err(refused) {
        assert_eq!(decode::<Machine>(&encode(&machine).unwrap()).unwrap(), machine);
    }
    // Not compared: floating-point numbers need not keep their last digit.
    decode::<serde_json::Value>(&whole).unwrap();
    // A change of any bit is detected.
    let at = bytes.len() * 37 % whole.len();
    whole[at] ^= 1 << (bytes.len() % 8);
    assert!(decode::<serde_json::Value>(&whole).is_err());
});
