// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![deny(unused_must_use)]

use demand_uffd::FaultService;

fn main() {
    FaultService::start(1).unwrap();
}
