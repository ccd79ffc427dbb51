// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the documents name is there.

use std::fs;
use std::path::Path;

/// Each test that the table of failures names exists, as a test, in the file that it names.
#[test]
fn each_failure_has_its_test() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let document = fs::read_to_string(top.join("docs/failures.md")).unwrap();
    let mut found = 0;
    for row in document.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`")) {
        let shown_by = row.rsplit('|').nth(1).unwrap();
        let mut file = String::new();
        // Between each pair of back-quotes: a file, or a function of the last file.
        for name in shown_by.split('`').skip(1).step_by(2) {
            if name.ends_with(".rs") {
                file = fs::read_to_string(top.join(name))
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
                continue;
            }
            let test = file
                .split("#[test]")
                .skip(1)
                .any(|rest| rest.trim_start().starts_with(&format!("fn {name}(")));
            assert!(test, "there is no test '{name}', which is named in: {row}");
            found += 1;
        }
    }
    assert!(found > 40, "only {found} tests are named");
}
