// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bad input to the commands that run Linux guests: each case yields one clear line and the right
//! exit status, or an answer of the API; nothing changes on the disk or in the guest.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod api;
mod devices;
mod endings;
mod files;
mod full_disk;
mod options;
mod pages;
mod run;
mod snapshot;
mod state;

#[test]
fn storage_server() {
    test_support::fuse::serve();
}
