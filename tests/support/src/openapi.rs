// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The description of demand-vmm's API (`openapi.yaml`), and its schemas.

use serde_json::Value;

/// Returns the description.
pub fn description() -> Value {
    let text = include_str!("../../../vmm/src/api/openapi.yaml");
    serde_saphyr::from_str(text).expect("the description is YAML")
}

/// Returns the validator of the schema `name`.
pub fn schema(name: &str) -> jsonschema::Validator {
    let mut root = description();
    root["$ref"] = format!("#/components/schemas/{name}").into();
    jsonschema::draft202012::new(&root).expect("the description has JSON schemas")
}

/// Panics unless the value is as the schema `name` says.
#[track_caller]
pub fn check(name: &str, value: &Value) {
    let faults: Vec<_> = schema(name).iter_errors(value).map(|fault| fault.to_string()).collect();
    assert!(faults.is_empty(), "{value} is not a {name}: {faults:?}");
}
