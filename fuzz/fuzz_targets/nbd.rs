// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the NBD client with the bytes of a hostile server: its negotiation, and its replies to
//! reads and look-ups in flight. No read may succeed without all of its bytes.
#![no_main]

use demand_remote::nbd::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((0, rest)) => fuzzing::negotiation(rest),
        Some((kind, rest)) => fuzzing::replies(rest, kind % 2 == 1),
        None => {}
    }
});
