// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test guest's memory map is that of the VMM's machine.

use demand_vmm::arch::placement::{HIGH_MEMORY, LOW_MEMORY_END, place};
use test_guest::windows;

const M: u64 = 1 << 20;
const G: u64 = 1 << 30;

// The test guest relies on these values.
const _: () = assert!(LOW_MEMORY_END == windows::LOW_MEMORY_END);
const _: () = assert!(HIGH_MEMORY == windows::HIGH_MEMORY);

/// The test guest's plan and the machine agree on the address of each byte.
#[test]
fn guest_addresses_match_the_machine() {
    for size in [64 * M, 3 * G - 2 * M, 3 * G, 3 * G + 2 * M, 5 * G, 64 * G] {
        for region in place(size) {
            for at in [0, region.size / 2, region.size - 1] {
                let address = windows::guest_address(region.image_offset + at);
                assert_eq!(address, region.start.0 + at);
            }
        }
    }
}
