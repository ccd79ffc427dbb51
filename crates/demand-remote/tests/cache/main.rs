// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the host cache: damage, power cuts, eviction, full disks and hostile directories, and
//! processes that share a cache while one of them is killed or stopped.

mod child;
mod damage;
mod directory;
mod eviction;
mod full_disk;
mod power_cut;
mod processes;
mod server;
mod shared;
#[allow(dead_code, unreachable_pub, reason = "other test programs use the rest of this module")]
#[path = "../image/support.rs"]
mod support;
