// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names in the documents exist, and the commands in them do what they say.

use std::fs;
use std::path::{Path, PathBuf};

use demand_tests::commands::{blocks, run_all};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::program;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// Returns the names between back-quotes in a cell, each with the content of the file named before
/// it.
fn named<'a>(cell: &'a str, row: &str) -> Vec<(String, &'a str)> {
    let (mut file, mut names) = (String::new(), Vec::new());
    for name in cell.split('`').skip(1).step_by(2) {
        if name.ends_with(".rs") {
            file = fs::read_to_string(top().join(name))
                .unwrap_or_else(|error| panic!("{name}: {error}, which is named in: {row}"));
        } else {
            names.push((file.clone(), name));
        }
    }
    names
}

/// Panics unless each name in the cell is a test of its file; returns the number of names.
fn check_tests(cell: &str, row: &str) -> usize {
    let names = named(cell, row);
    for (file, name) in &names {
        let test = file
            .split("#[test]")
            .skip(1)
            .any(|rest| rest.trim_start().starts_with(&format!("fn {name}(")));
        assert!(test, "there is no test '{name}', which is named in: {row}");
    }
    names.len()
}

/// Each test in the table of failures exists, as a test, in the file given there.
#[test]
fn each_failure_has_its_test() {
    let document = fs::read_to_string(top().join("docs/failures.md")).unwrap();
    let rows = document.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`"));
    let found: usize = rows.map(|row| check_tests(row.rsplit('|').nth(1).unwrap(), row)).sum();
    assert!(found > 40, "only {found} tests are named");
}

/// The functions, tests and mutants of each invariant exist, and each mutant is named.
#[test]
fn each_invariant_has_its_links() {
    let document = fs::read_to_string(top().join("DESIGN.md")).unwrap();
    let mutants: Vec<String> = fs::read_dir(top().join("rust-vmm-ci/mutants"))
        .unwrap()
        .filter_map(|entry| {
            Some(entry.unwrap().file_name().to_str()?.strip_suffix(".patch")?.into())
        })
        .collect();
    let rows: Vec<&str> = document.lines().filter(|line| line.starts_with("| **")).collect();
    assert_eq!(rows.len(), 8, "invariants");
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, _, kept_by, shown_by, broken_by, _] = cells[..] else {
            panic!("not four cells: {row}")
        };
        let kept_by = named(kept_by, row);
        assert!(!kept_by.is_empty(), "no function keeps it: {row}");
        for (file, name) in kept_by {
            assert!(
                file.contains(&format!("fn {name}(")) || file.contains(&format!("fn {name}<")),
                "there is no function '{name}', which is named in: {row}"
            );
        }
        assert!(check_tests(shown_by, row) > 0, "no test shows it: {row}");
        for name in broken_by.split(", ") {
            assert!(mutants.iter().any(|mutant| mutant == name), "there is no mutant '{name}'");
        }
    }
    for mutant in mutants {
        assert!(document.contains(&mutant), "DESIGN.md names no invariant for '{mutant}'");
    }
}

/// Runs a document's commands as a user would, after building the workspace and with a guest.
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
