// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of chunked images: content, damage, increments, removal, and reading over a bad link.
#![cfg(feature = "image")]

mod bucket;
mod cluster;
mod collect;
mod damage;
#[cfg(feature = "http")]
mod far;
mod increments;
mod link;
mod malformed;
mod power_cut;
mod resume;
mod round_trip;
mod sizes;
mod stress;
mod support;
