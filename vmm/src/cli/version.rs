// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The version of the program.

use std::sync::LazyLock;

use demand_kvm::Engine;

/// The version and the commit, as `-V` prints them.
pub(crate) const SHORT: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("DEMAND_VMM_COMMIT"), ")");

/// The version, the commit and the engines, as `--version` prints them.
pub(crate) static LONG: LazyLock<String> = LazyLock::new(|| {
    let engines = Engine::ALL.map(|engine| engine.to_string());
    format!("{SHORT}\nengines: {}", engines.join(", "))
});
