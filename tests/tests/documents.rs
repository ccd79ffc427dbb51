// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the documents name is there, and the commands that they show do what they say.

use std::fs;
use std::path::{Path, PathBuf};

use demand_tests::commands::{blocks, run_all};
use demand_tests::guest::Kernel;
use demand_tests::process::program;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// Each test that the table of failures names exists, as a test, in the file that it names.
#[test]
fn each_failure_has_its_test() {
    let top = top();
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

/// Runs a document's commands as a user would who has built the workspace and has a guest.
fn runs(name: &str, at_least: usize) {
    let blocks = blocks(&fs::read_to_string(top().join(name)).unwrap()).unwrap();
    assert!(blocks.len() >= at_least, "{name} has only {} blocks that run", blocks.len());
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    let demand_vmm = program("demand-vmm").unwrap();
    let variables = [("KERNEL", &*kernel.image), ("INITRAMFS", &*kernel.initramfs)];
    let printed = run_all(&blocks, folder.path(), demand_vmm.parent().unwrap(), &variables);
    println!("{}", printed.unwrap_or_else(|error| panic!("{name}: {error:#}")));
}

#[test]
fn the_readmes_commands_run() {
    runs("README.md", 3);
}

#[test]
fn the_vmms_readmes_commands_run() {
    runs("vmm/README.md", 4);
}
