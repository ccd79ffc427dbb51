// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the whole-system tests and the demo share: they run the project's own programs as a user
//! would, as processes of their own, with real images, and look at what comes out.

pub mod backend;
pub mod process;
pub mod sandbox;
pub mod scenario;

pub use test_support::host;

/// Why a guest cannot be run on demand-paged memory here, if it cannot.
pub fn cannot_run() -> Option<String> {
    if !host::has_kvm() {
        return Some("there is no usable /dev/kvm".into());
    }
    demand_uffd::probe().err().map(|error| error.to_string())
}
