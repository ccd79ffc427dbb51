// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of chunked images in a directory: content, damage, increments, and removal.
#![cfg(feature = "image")]

mod collect;
mod damage;
mod increments;
mod malformed;
mod resume;
mod round_trip;
mod sizes;
mod stress;
mod support;
