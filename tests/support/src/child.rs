// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests whose settings come from the environment, which is the process's: they run in a process of
//! their own, which the test program starts.

use std::process::Command;

const VARIABLE: &str = "TEST_CHILD";

/// Returns whether this process is one that [`run`] has started.
pub fn is_child() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Runs this test of this program in a new process, with these variables and `PATH` only.
///
/// # Panics
///
/// If the test fails there.
pub fn run(test: &str, variables: &[(&str, &str)]) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env_clear().env(VARIABLE, "1");
    child.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    let output = child.envs(variables.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    print!("{said}");
}
