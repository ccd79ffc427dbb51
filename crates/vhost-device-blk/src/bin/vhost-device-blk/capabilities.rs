// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capabilities that management software asks for (`--print-capabilities`), as the vhost-user
//! specification's schema defines them.

use serde::Serialize;

/// `VHostUserBackendCapabilities` of the schema, for the type "block".
#[derive(Debug, Serialize)]
struct Capabilities {
    r#type: &'static str,
    features: [&'static str; 2],
}

/// Returns the capabilities as JSON.
pub(crate) fn json() -> String {
    // Each feature is the option of the same name.
    let capabilities = Capabilities { r#type: "block", features: ["read-only", "blk-file"] };
    serde_json::to_string_pretty(&capabilities).expect("it consists of strings")
}
