// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crates' own benchmarks, by criterion: figures without a reference.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::table::Row;

const PART: &str = "crates";

/// The criterion benchmarks; a crate's own tests, which cargo counts as benchmarks too, do not know
/// criterion's options.
const BENCHES: [&str; 6] = ["read", "pager", "exit", "fault", "connect", "request"];

pub(crate) fn rows() -> Result<Vec<Row>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["bench", "--quiet", "--workspace"])
        .args(BENCHES.map(|name| format!("--bench={name}")))
        .args(["--", "--quiet", "--noplot"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("run cargo bench")?;
    ensure!(status.success(), "cargo bench ended with {status}");
    // In the target folder, which also holds the programs.
    let this = std::env::current_exe()?;
    let target = this.ancestors().nth(2).context("find the target folder")?;
    let mut rows = Vec::new();
    collect(&target.join("criterion"), &mut rows)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn collect(folder: &Path, rows: &mut Vec<Row>) -> Result<()> {
    let benchmark = folder.join("new/benchmark.json");
    if benchmark.is_file() {
        let read = |path: &Path| -> Result<Value> {
            Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
        };
        let name = read(&benchmark)?["full_id"].as_str().unwrap_or_default().to_string();
        let estimates = read(&folder.join("new/estimates.json"))?;
        let median = estimates["median"]["point_estimate"].as_f64();
        rows.push(Row::new(PART, name, "ns", median.context("a median")?));
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, rows)?;
        }
    }
    Ok(())
}
