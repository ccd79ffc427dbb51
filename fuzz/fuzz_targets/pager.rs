// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the receiving end of a pager's connection with answers to four faults. No fault may
//! succeed without all of its bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| demand_pager::fuzzing::answers(bytes));
