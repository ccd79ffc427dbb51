// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! State files of snapshots: any bytes, and any JSON under a header that fits it. They are
//! understood or refused, and an altered bit is found.
#![no_main]

use demand_vmm::snapshot_dir::{decode, encode};
use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};

/// Something of the shape of a VM's state.
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
    let refused = |error: String| assert!(!error.is_empty());
    let _ = decode::<Machine>(bytes).map_err(refused);
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
    let mut whole = encode(&json).unwrap();
    if let Ok(machine) = decode::<Machine>(&whole).map_err(refused) {
        assert_eq!(decode(&encode(&machine).unwrap()), Ok(machine));
    }
    // (Its numbers need not be the same: not each fraction is kept to the last digit.)
    decode::<serde_json::Value>(&whole).unwrap();
    // Any bit of it counts.
    let at = bytes.len() * 37 % whole.len();
    whole[at] ^= 1 << (bytes.len() % 8);
    assert!(decode::<serde_json::Value>(&whole).is_err());
});
