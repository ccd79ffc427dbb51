// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs as clients: curl, and the commands of `demand-vmm`.

use std::io::ErrorKind;
use std::process::{Command, Output};

use demand_vmm::api::Status;

use crate::harness::server;

#[test]
fn curl_is_understood() {
    let server = server();
    let curl = |arguments: &[&str]| {
        Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "20", "--write-out", " %{http_code}"])
            .arg("--unix-socket")
            .arg(&server.path)
            .args(arguments)
            .output()
    };
    let told = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let status = match curl(&["http://vmm/api/v1/status"]) {
        Ok(output) => told(output),
        // The lab has no foreign programs, and a run on the host is enough.
        Err(error) if error.kind() == ErrorKind::NotFound && test_support::host::is_lab() => return,
        Err(error) => return test_support::host::skip(&format!("curl: {error}")),
    };
    assert!(status.contains("\"state\":\"running\"") && status.ends_with(" 200"), "{status}");
    let both = ["http://vmm/api/v1/status", "http://vmm/api/v1/status"];
    assert_eq!(told(curl(&both).unwrap()).matches("\"pid\"").count(), 2);
    assert!(told(curl(&["-X", "PUT", "http://vmm/api/v1/pause"]).unwrap()).ends_with(" 200"));
    assert!(told(curl(&["--head", "http://vmm/api/v1/status"]).unwrap()).ends_with(" 200"));
    let metrics = told(curl(&["--include", "http://vmm/metrics"]).unwrap());
    assert!(metrics.contains("Content-Type: application/openmetrics-text; version=1.0.0"));
    assert!(metrics.contains("\ndemand_vmm_present_pages 64\n"), "{metrics}");
    // A body that is long enough for curl to wait for the server's word.
    let body = format!("{{\"destination\":\"/{}\"}}", "a".repeat(1 << 15));
    let url = "http://vmm/api/v1/snapshot";
    for (body, expect, status) in [
        (body.as_str(), "Expect: 100-continue", " 200"),
        (&body, "Expect:", " 200"),
        (r#"{"destination":"/a"}"#, "Expect:", " 200"),
        ("destination=/a", "Expect:", " 400"),
    ] {
        let answer = told(curl(&["--data", body, "--header", expect, url]).unwrap());
        assert!(answer.ends_with(status), "{answer}");
    }
    let long = server.folder.path().join("long");
    std::fs::write(&long, vec![b' '; 3 << 20]).unwrap();
    let data = format!("@{}", long.display());
    assert!(told(curl(&["--data-binary", &data, url]).unwrap()).ends_with(" 413"));
    let chunked = ["--header", "Transfer-Encoding: chunked", "--data", "{}", url];
    assert!(told(curl(&chunked).unwrap()).ends_with(" 501"));
}

#[test]
fn the_program_asks_and_tells() {
    let server = server();
    let program = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
            .args(arguments)
            .arg("--api-socket")
            .arg(&server.path)
            .current_dir(server.folder.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let right = |arguments: &[&str]| {
        let (code, told, errors) = program(arguments);
        assert_eq!((code, errors.as_str()), (Some(0), ""), "{arguments:?}");
        told
    };
    assert!(right(&["status"]).starts_with("running: 1M of shmem, engine uffd, 2 vCPUs\n"));
    let status: Status = serde_json::from_str(&right(&["status", "--json"])).unwrap();
    assert_eq!(status.pages_present, 64);
    assert_eq!(right(&["pause"]), "paused\n");
    assert_eq!(right(&["resume"]), "running\n");
    let here = server.folder.path().canonicalize().unwrap().join("a");
    let summary = right(&["snapshot", "--then", "resume", "a"]);
    assert_eq!(
        summary,
        format!("{}: 4K with content, 1020K of holes, 4K written in 7 us\n", here.display())
    );
    let asked = format!("{} Some(Resume)", here.display());
    assert_eq!(server.record.asked(), ["pause", "resume", &asked]);
    assert_eq!(right(&["shutdown"]), "stopped\n");
    let wrong = (
        Some(1),
        String::new(),
        "demand-vmm: cannot pause: the VM has ended; start another\n".to_string(),
    );
    assert_eq!(program(&["pause"]), wrong);
    drop(server.server);
    let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
        .args(["status", "--api-socket"])
        .arg(&server.path)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("no VMM listens at") && error.lines().count() == 1, "{error}");
    assert_eq!(output.status.code(), Some(1));
}
