// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every end of a guest: signals are an end in order, and the table, the report and the timeline
//! are written at an end of any kind, as a whole or not at all.

use std::ffi::OsString;
use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{Guarded, Output, console_waits, program, run};
use demand_tests::refusal::{FAILED, USAGE, refused};
use demand_tests::sandbox::is_root;
use demand_tests::tiny_kernel::{LOOP, PRINT, pvh_kernel};
use demand_vmm::api::State;
use demand_vmm::api::client::Client;
use rustix::fs::{OFlags, fcntl_setfl};
use serde_json::{Value, json};
use test_support::wait::until;

/// Time limit for an end on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// An invalid instruction. Without an interrupt table it causes a triple fault.
const CRASH: &[u8] = &[0x0f, 0x0b];

/// A folder with a kernel, for a guest that has outputs there.
struct Setting(tempfile::TempDir);

impl Setting {
    /// Returns `None` if this machine has no KVM.
    fn new(code: &[u8]) -> Option<Self> {
        if !has_kvm() {
            skip("there is no usable /dev/kvm");
            return None;
        }
        let setting = Setting(tempfile::tempdir().unwrap());
        fs::write(setting.at("kernel"), pvh_kernel(code)).unwrap();
        fs::create_dir(setting.at("out")).unwrap();
        Some(setting)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the arguments of the guest.
    fn arguments(&self) -> Vec<OsString> {
        self.arguments_with("out/timeline")
    }

    /// The same, with another file for the timeline.
    fn arguments_with(&self, timeline: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            ["run", "--memory", "size=64M", "--serial", "off"].map(Into::into).into();
        for (option, name) in [
            ("--kernel", "kernel"),
            ("--api-socket", "vm.sock"),
            ("--report", "out/report"),
            ("--timeline", timeline),
        ] {
            arguments.extend([option.into(), self.at(name).into()]);
        }
        arguments
    }

    fn command(&self) -> Command {
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(self.arguments());
        command
    }

    /// Returns the process that serves the API once the guest runs.
    fn wait_running(&self) -> u32 {
        let client = Client::new(self.at("vm.sock"));
        until("the guest runs", || {
            client.status().is_ok_and(|status| status.state == State::Running)
        });
        client.status().unwrap().pid
    }

    /// Ends the guest by a signal while a thread collects its output.
    fn ended_by(&self, command: &mut Command, signals: &[libc::c_int]) -> Output {
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(command, SOON).unwrap());
            let id = self.wait_running();
            signals.iter().for_each(|number| signal(id, *number));
            running.join().unwrap()
        })
    }

    /// Checks that the output files are complete, and that nothing else was left.
    fn check_files(&self) -> Value {
        let mut names: Vec<_> =
            fs::read_dir(self.at("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["report", "timeline"]);
        assert!(fs::read_to_string(self.at("out/timeline")).unwrap().ends_with("</svg>\n"));
        serde_json::from_slice(&fs::read(self.at("out/report")).unwrap()).unwrap()
    }
}

fn signal(process: u32, signal: libc::c_int) {
    let process = libc::pid_t::try_from(process).unwrap();
    // SAFETY: the call takes numbers; the process has not been reaped, so its ID is not reused.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

fn has_table(output: &Output) -> bool {
    output.stdout.starts_with("run: 64M of shmem, engine none, 1 vCPU\n")
}

#[test]
fn signals_end_the_guest_in_order() {
    let Some(setting) = Setting::new(LOOP) else { return };
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let output = setting.ended_by(&mut setting.command(), &[number]);
        assert!(output.status.success() && has_table(&output), "signal {number}: {output:?}");
        assert_eq!(output.complaints(), "");
        let report = setting.check_files();
        assert_eq!((&report["cpus"], &report["error"]), (&1.into(), &Value::Null));
        assert!(!setting.at("vm.sock").exists());
    }
}

/// A shell without job control starts background jobs with SIGINT ignored, and `nohup` ignores
/// SIGHUP: what is typed on the terminal, and its end, are not for them.
#[test]
fn inherited_ignored_signals_stay_ignored() {
    let Some(setting) = Setting::new(LOOP) else { return };
    let mut command = Command::new("sh");
    command.args(["-c", "nohup \"$@\" & wait $!", "sh"]);
    command.arg(program("demand-vmm").unwrap()).args(setting.arguments());
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&mut command, SOON).unwrap());
        let id = setting.wait_running();
        signal(id, libc::SIGINT);
        signal(id, libc::SIGHUP);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(setting.wait_running(), id);
        signal(id, libc::SIGTERM);
        running.join().unwrap()
    });
    assert!(output.status.success() && has_table(&output), "{output:?}");
    setting.check_files();
}

#[test]
fn failed_guest_leaves_its_report() {
    let Some(setting) = Setting::new(CRASH) else { return };
    let output = run(&mut setting.command(), SOON).unwrap();
    assert_eq!(output.status.code(), Some(FAILED), "{output:?}");
    assert!(has_table(&output), "{output:?}");
    let report = setting.check_files();
    // (A guest that a signal ends may have executed none.)
    assert!(report["time_to_first_instruction_us"].as_u64().unwrap() > 0);
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("reset itself 10 times"), "{error}");
    let last = output.stderr.lines().last().unwrap();
    assert_eq!(last, format!("demand-vmm: {error}"));
}

/// The table comes first, so that it is not lost with the files.
#[test]
fn full_disk_keeps_old_report_and_table() {
    let Some(setting) = Setting::new(LOOP) else { return };
    if !is_root() {
        return skip("only root can mount a file system");
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(
        "mount -t tmpfs -o size=64k none \"$0\" && printf old > \"$0/report\" && \
         ! head -c 64k /dev/zero > \"$0/fill\" 2> /dev/null && \"$@\"; \
         status=$?; ls -A \"$0\" | sort; cat \"$0/report\"; exit $status",
    );
    command.arg(setting.at("out")).arg(program("demand-vmm").unwrap()).args(setting.arguments());
    let output = setting.ended_by(&mut command, &[libc::SIGTERM]);
    assert_eq!(output.status.code(), Some(FAILED), "{output:?}");
    assert!(has_table(&output) && output.stdout.ends_with("\nfill\nreport\nold"), "{output:?}");
    let last = output.stderr.lines().last().unwrap();
    for words in
        ["demand-vmm: --report: cannot write ", "No space left on device", "free some space"]
    {
        assert!(last.contains(words), "{words} is not in: {last}");
    }
    // The picture cannot be written either.
    assert!(
        output.stderr.lines().any(|line| line.contains("--timeline: cannot write ")),
        "{output:?}"
    );
}

#[test]
fn limit_of_file_sizes_keeps_the_old_report() {
    let Some(setting) = Setting::new(LOOP) else { return };
    fs::write(setting.at("out/report"), "old").unwrap();
    let output = std::thread::scope(|scope| {
        let mut command = setting.command();
        // Otherwise a build that measures coverage writes more, and complains.
        command.env("LLVM_PROFILE_FILE", "/dev/null");
        let running = scope.spawn(move || run(&mut command, SOON).unwrap());
        let id = setting.wait_running();
        let limit = libc::rlimit { rlim_cur: 100, rlim_max: 100 };
        let id_of_type = libc::pid_t::try_from(id).unwrap();
        // SAFETY: the call reads the structure, and changes only the child.
        let set = unsafe {
            libc::prlimit(id_of_type, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut())
        };
        assert_eq!(set, 0);
        signal(id, libc::SIGTERM);
        running.join().unwrap()
    });
    assert!(has_table(&output), "{output:?}");
    let last = output.stderr.lines().last().unwrap();
    assert!(last.contains("File too large") && last.contains("(ulimit -f)"), "{last}");
    assert_eq!(fs::read_to_string(setting.at("out/report")).unwrap(), "old");
    assert_eq!(fs::read_dir(setting.at("out")).unwrap().count(), 1);
}

/// A file that is a mount, as in a container, cannot be replaced.
#[test]
fn mounted_file_is_overwritten() {
    let Some(setting) = Setting::new(LOOP) else { return };
    if !is_root() {
        return skip("only root can mount a file");
    }
    fs::write(setting.at("out/report"), "old").unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" \"$0\" && exec \"$@\""]);
    command.arg(setting.at("out/report"));
    command.arg(program("demand-vmm").unwrap()).args(setting.arguments());
    let output = setting.ended_by(&mut command, &[libc::SIGTERM]);
    assert!(output.status.success() && output.complaints().is_empty(), "{output:?}");
    setting.check_files();
}

#[test]
fn pipe_is_kept_for_its_reader() {
    let Some(setting) = Setting::new(LOOP) else { return };
    let pipe = setting.at("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Opened before there is a writer, which then finds a reader.
    let mut options = fs::OpenOptions::new();
    let mut reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(setting.arguments_with("pipe"));
    let output = setting.ended_by(&mut command, &[libc::SIGTERM]);
    assert!(output.status.success(), "{output:?}");
    let mut picture = String::new();
    reader.read_to_string(&mut picture).unwrap();
    assert!(picture.ends_with("</svg>\n"), "{picture}");
}

#[test]
fn report_on_standard_output_follows_the_table() {
    let Some(setting) = Setting::new(LOOP) else { return };
    // As a file, into which the shell has already written.
    let out = setting.at("stdout");
    let mut command = Command::new("sh");
    command.arg("-c").arg("{ echo first; \"$@\"; echo last; } > \"$0\"").arg(&out);
    command.arg(program("demand-vmm").unwrap()).args(["run", "--memory", "size=64M"]);
    command
        .args(["--serial", "off", "--report", "/dev/stdout", "--kernel"])
        .arg(setting.at("kernel"));
    command.arg("--api-socket").arg(setting.at("vm.sock"));
    let output = setting.ended_by(&mut command, &[libc::SIGTERM]);
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(out).unwrap();
    let text = text.strip_prefix("first\nrun: 64M of shmem").unwrap();
    let json = text.strip_suffix("\nlast\n").unwrap();
    let json = &json[json.find('{').unwrap()..];
    let _: Value = serde_json::from_str(json).unwrap();
}

/// Returns a pipe that takes nothing more until it is read.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (reader, writer)
}

/// Time between two signals that are not the same request.
const APART: Duration = Duration::from_millis(300);

/// An end in order waits a second for the reader of the console, which does not read.
#[test]
fn second_signal_ends_at_once() {
    let Some(setting) = Setting::new(PRINT) else { return };
    let ended = |signals: &[libc::c_int], pause| {
        let (_reader, console) = full_pipe();
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(["run", "--memory", "size=64M", "--kernel"]).arg(setting.at("kernel"));
        command.arg("--api-socket").arg(setting.at("vm.sock")).stdout(console);
        let mut vmm = Guarded::spawn(command.stdin(Stdio::null()).stderr(Stdio::null())).unwrap();
        drop(command);
        let id = setting.wait_running();
        until("the console waits", || console_waits(id));
        let begun = Instant::now();
        for (index, number) in signals.iter().enumerate() {
            // A signal that follows at once is the same request.
            thread::sleep(if index > 0 { pause } else { Duration::ZERO });
            signal(id, *number);
        }
        (vmm.wait(SOON).unwrap(), begun.elapsed())
    };
    // Another signal than the first, with which it might be merged.
    let (status, _) = ended(&[libc::SIGINT, libc::SIGTERM], APART);
    assert_eq!(status.code(), Some(128 + libc::SIGTERM), "{status}");
    // `timeout` signals its command, and then the whole process group.
    for signals in [&[libc::SIGTERM][..], &[libc::SIGTERM, libc::SIGINT]] {
        let (status, took) = ended(signals, Duration::ZERO);
        assert!(status.success() && took >= Duration::from_secs(1), "{status} after {took:?}");
    }
}

/// A process that began without a VM reports as others do, and its files are no inputs of the VM.
#[test]
fn process_without_a_vm_reports_its_guest() {
    let Some(setting) = Setting::new(LOOP) else { return };
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["--stage", "api", "--api-socket"]).arg(setting.at("vm.sock"));
    command.arg("--report").arg(setting.at("out/report"));
    command.arg("--timeline").arg(setting.at("out/timeline"));
    command.arg("--log-file").arg(setting.at("log"));
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&mut command, SOON).unwrap());
        let client = Client::new(setting.at("vm.sock"));
        until("the API is served", || client.status().is_ok());
        let config = |kernel: &str, serial: Value| {
            let kernel = setting.at(kernel);
            let config = json!({"memory": {"size": "64M"}, "kernel": kernel, "serial": serial});
            serde_json::from_value(config).unwrap()
        };
        fs::write(setting.at("out/report"), pvh_kernel(LOOP)).unwrap();
        for (kernel, serial, words) in [
            ("log", json!("off"), ["--log-file: cannot write ", "it is the input"]),
            ("out/report", json!("off"), ["--report: cannot write ", "it is the input"]),
            ("kernel", json!({"file": setting.at("log")}), ["serial: ", "--log-file writes it"]),
            ("kernel", json!({"file": setting.at("kernel")}), ["serial: ", "is the input"]),
        ] {
            client.create(&config(kernel, serial)).unwrap();
            let error = client.boot().unwrap_err().to_string();
            assert!(words.iter().all(|words| error.contains(words)), "{error}, not: {words:?}");
            let words = [" ERROR ", "the VM was not started: ", words[0], words[1]];
            until("the log has it", || {
                let log = fs::read_to_string(setting.at("log")).unwrap();
                log.lines().any(|line| words.iter().all(|words| line.contains(words)))
            });
        }
        client.create(&config("kernel", json!("off"))).unwrap();
        client.boot().unwrap();
        client.shutdown().unwrap();
        running.join().unwrap()
    });
    let table = output.stdout.starts_with("api: 64M of shmem, engine none, 1 vCPU\n");
    assert!(output.status.success() && table && output.complaints().is_empty(), "{output:?}");
    assert_eq!(setting.check_files()["stage"], "api");
    assert!(!setting.at("vm.sock").exists());
}

/// These belong to a VM that did not run.
#[test]
fn process_without_a_vm_leaves_no_report() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.arg("--api-socket").arg(folder.path().join("vm.sock"));
    command.arg("--report").arg(folder.path().join("report"));
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&mut command, SOON).unwrap());
        let client = Client::new(folder.path().join("vm.sock"));
        until("the API is served", || client.status().is_ok());
        client.shutdown().unwrap();
        running.join().unwrap()
    });
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["--report", "x", "status", "--api-socket", "y"]);
    refused(&mut command, USAGE, &["--report is before the command; give it after"]);
}
