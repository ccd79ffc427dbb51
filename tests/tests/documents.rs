// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names in the documents exist, and the commands in them do what they say.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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
            assert!(mutants.iter().any(|mutant| mutant == name), "unknown mutant '{name}'");
        }
    }
    for mutant in mutants {
        assert!(document.contains(&mutant), "DESIGN.md names no invariant for '{mutant}'");
    }
}

/// Each wrong order is shown by a test, or by a program that does not compile.
#[test]
fn each_wrong_order_is_shown() {
    let document = fs::read_to_string(top().join("DESIGN.md")).unwrap();
    let section = document.split("\n## ").find(|part| part.starts_with("Wrong orders")).unwrap();
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() >= 15, "only {} wrong orders", rows.len());
    let programs = top().join("crates/demand-kvm/tests/compile_fail");
    let mut named_programs = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, _, outcome, shown_by, _] = cells[..] else { panic!("not three cells: {row}") };
        if let Some(program) = outcome.strip_prefix("compile error: ") {
            named_programs += 1;
            let program = program.trim_matches('`');
            assert!(programs.join(format!("{program}.rs")).exists(), "{program}: {row}");
        } else {
            let known = ["error: ", "harmless: ", "log: "];
            assert!(known.iter().any(|known| outcome.starts_with(known)), "{row}");
        }
        assert!(check_tests(shown_by, row) > 0, "no test shows it: {row}");
    }
    let count = fs::read_dir(programs).unwrap().filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|ext| ext == "rs"))
    });
    assert_eq!(named_programs, count.count(), "each program has a row");
}

/// Each step for rust-vmm's CI has what its pipeline generator asks for, and runs existing scripts.
#[test]
fn ci_steps_run_existing_scripts() {
    let text = fs::read_to_string(top().join(".buildkite/custom-tests.json")).unwrap();
    let description: serde_json::Value = serde_json::from_str(&text).unwrap();
    let steps = description["tests"].as_array().expect("a list of tests");
    let mut scripts = Vec::new();
    for step in steps {
        let word = |key: &str| step[key].as_str().unwrap_or_else(|| panic!("no {key}: {step}"));
        assert!(!word("test_name").is_empty());
        let platforms = step["platform"].as_array().expect("a list of platforms");
        assert!(platforms.iter().all(|platform| platform == "x86_64"), "{step}");
        for command in word("command").split(" && ") {
            let script = command.split(' ').next().unwrap();
            let mode = fs::metadata(top().join(script))
                .unwrap_or_else(|error| panic!("{script}: {error}"))
                .permissions()
                .mode();
            assert!(mode & 0o111 == 0o111, "{script} is not executable");
            scripts.push(script.to_owned());
        }
    }
    assert!(scripts.iter().any(|script| script == "rust-vmm-ci/test"), "{scripts:?}");
}

/// The README of rust-vmm-ci has a row for each of its scripts, and each of its folders a README.
#[test]
fn ci_entries_are_described() {
    let folder = top().join("rust-vmm-ci");
    let readme = fs::read_to_string(folder.join("README.md")).unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            assert!(path.join("README.md").exists(), "{name} has no README.md");
            assert!(readme.contains(&format!("({name}/README.md)")), "no link to {name}");
        } else if !name.contains('.') {
            assert!(readme.contains(&format!("\n| `{name}` |")), "no row for {name}");
        }
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
fn the_test_vmms_readmes_commands_run() {
    runs("tests/test-vmm/README.md", 2);
}

#[test]
fn the_vmms_readmes_commands_run() {
    runs("vmm/README.md", 4);
}
