// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bad input: each case yields one clear line and the right exit status.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use demand_kvm::Engine;
use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::cannot_run;
use demand_tests::host::{free_units, has_kvm, skip};
use demand_tests::process::{Guarded, program, run};
use demand_tests::refusal::{FAILED, HOST, USAGE, refused};
use demand_tests::sandbox::{Device, for_everybody, is_root, with_devices, with_limit};
use test_support::fuse::SlowFile;

/// A folder with a memory image and a disk, and the arguments of a run on them that would succeed.
struct Setting {
    folder: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut make = Command::new(program("test-vmm").unwrap());
        make.arg("make-image").arg("--memory").arg(folder.path().join("memory.img"));
        make.args(["--size", "8M", "--disk-size", "8M"]);
        make.arg("--disk").arg(folder.path().join("disk.img"));
        assert!(run(&mut make, Duration::from_secs(60)).unwrap().status.success());
        Setting { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run_command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("run").arg("--source").arg(self.path("memory.img"));
        command
    }

    fn vmm(&self) -> Command {
        self.run_command(&program("test-vmm").unwrap())
    }

    /// Starts the project's own back-end on the disk.
    fn back_end(&self, postcopy: bool) -> BackEnd {
        let options = BlkOptions { queues: 1, queue_size: 256, postcopy };
        BackEnd::vhost_device_blk(self.folder.path(), &self.path("disk.img"), &options).unwrap()
    }

    /// Returns a run with a disk at `socket`.
    fn with_disk(&self, socket: &Path) -> Command {
        let mut command = self.vmm();
        command.args(["--memory", "size=8M"]);
        command.arg("--vhost-user").arg(format!("blk,socket={}", socket.display()));
        let disk = self.path("disk.img");
        command
            .arg("--test-guest")
            .arg(format!("requests=4,write-area=4M,pristine={0},disk={0}", disk.display()));
        command
    }
}

#[test]
fn more_memory_than_the_guest_can_use() {
    let setting = Setting::new();
    let mut command = setting.vmm();
    command.args(["--memory", "size=5G"]);
    refused(&mut command, USAGE, &["memory of 5G", "3G", "window=64M"]);
    let mut command = setting.vmm();
    command.args(["--memory", "size=5G", "--test-guest", "window=3M"]);
    refused(&mut command, USAGE, &["3145728", "multiple of 2097152"]);
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    // The image has the size of the lower region, and no content for the upper one.
    let mut command = setting.vmm();
    fs::OpenOptions::new()
        .write(true)
        .open(setting.path("memory.img"))
        .and_then(|image| image.set_len(3 << 30))
        .unwrap();
    command.args(["--memory", "size=5G", "--test-guest", "window=64M"]);
    refused(&mut command, FAILED, &["from offset 3221225472 of the image", "less memory"]);
}

#[test]
fn no_dev_kvm() {
    if !is_root() {
        return skip("only root can hide a device");
    }
    let setting = Setting::new();
    let mut command = setting.vmm();
    command.args(["--memory", "size=8M"]);
    with_devices(&mut command, Vec::new(), None);
    refused(&mut command, HOST, &["/dev/kvm", "No such file", "load the module"]);
}

#[test]
fn no_permission_on_dev_userfaultfd() {
    let kvm = Device::of_machine(c"/dev/kvm", 0o666);
    let uffd = Device::of_machine(c"/dev/userfaultfd", 0o600);
    let (true, true, Some(kvm), Some(uffd)) = (is_root(), has_kvm(), kvm, uffd) else {
        return skip("needs root, KVM and /dev/userfaultfd");
    };
    let setting = Setting::new();
    let vmm = for_everybody("test-vmm", setting.folder.path()).unwrap();
    let mut command = setting.run_command(&vmm);
    // Some kernels need no userfaultfd for the other engines.
    command.args(["--memory", "size=8M", "--engine", "uffd"]);
    with_devices(&mut command, vec![kvm, uffd], Some(65534));
    refused(&mut command, HOST, &["/dev/userfaultfd", "ermi"]);
}

#[test]
fn hugetlb_asked_for_and_none_free() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    // The maximum memory of a test guest.
    if free_units(demand_memory::BackingKind::Hugetlb2M) >= 1536 {
        return skip("there are more free huge pages than the test can ask for");
    }
    let setting = Setting::new();
    let image = fs::OpenOptions::new().write(true).open(setting.path("memory.img")).unwrap();
    image.set_len(3 << 30).unwrap();
    let mut command = setting.vmm();
    command.args(["--memory", "size=3G,backing=hugetlb-2m"]);
    refused(&mut command, HOST, &["hugetlb-2m", "vm.nr_hugepages"]);
}

/// Refused before its bitmaps, which are gigabytes, are allocated: that takes more than a second of
/// processor time.
#[test]
fn memory_of_many_tebibytes_is_refused_at_once() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    // Few disk file systems support files of that size.
    let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    image.as_file().set_len(60 << 40).unwrap();
    for size in ["10T", "60T"] {
        let mut command = Command::new(program("test-vmm").unwrap());
        command.arg("run").arg("--source").arg(image.path());
        command.arg("--memory").arg(format!("size={size}")).args(["--test-guest", "window=64M"]);
        with_limit(&mut command, libc::RLIMIT_CPU, 1);
        // By the limit of memslots, or of the processor's addresses.
        refused(&mut command, HOST, &[&format!("--memory: size={size}"), "ask for"]);
    }
}

#[test]
fn an_image_shorter_than_the_memory() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    let mut command = setting.vmm();
    command.args(["--memory", "size=16M"]);
    refused(&mut command, FAILED, &["image", &(16 << 20).to_string(), &(8 << 20).to_string()]);
}

#[test]
fn missing_image_is_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let mut command = Command::new(program("test-vmm").unwrap());
    command.args(["run", "--memory", "size=8M", "--source", "/nowhere/memory.img"]);
    refused(&mut command, FAILED, &["/nowhere/memory.img", "No such file"]);
}

#[test]
fn unsupported_engine_is_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    let mut command = setting.vmm();
    command.args(["--memory", "size=8M", "--engine", "kvm-userfault", "--verify"]);
    let engines = demand_kvm::probe().engines();
    if engines.iter().any(|report| report.engine == Engine::KvmUserfault && report.usable) {
        // This kernel has it: requesting it by name must then work.
        let output = run(&mut command, Duration::from_secs(120)).unwrap();
        assert!(output.status.success(), "{}", output.stderr);
    } else {
        refused(&mut command, HOST, &["kvm-userfault", "use --engine uffd"]);
    }
}

#[test]
fn a_back_end_without_pagefault() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    let back_end = setting.back_end(false);
    let words = ["PAGEFAULT", "zeros", back_end.socket().to_str().unwrap()];
    refused(&mut setting.with_disk(back_end.socket()), FAILED, &words);
}

#[test]
fn back_end_echoing_our_addresses_is_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    // A real one: QEMU's storage daemon uses libvhost-user.
    let back_end =
        BackEnd::qemu_storage_daemon(setting.folder.path(), &setting.path("disk.img")).unwrap();
    let words = ["names our address", back_end.socket().to_str().unwrap()];
    refused(&mut setting.with_disk(back_end.socket()), FAILED, &words);
}

#[test]
fn missing_socket_is_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    let words = ["/nowhere/blk.sock", "start the back-end first"];
    refused(&mut setting.with_disk(Path::new("/nowhere/blk.sock")), FAILED, &words);
}

/// The back-end serves another front-end: neither program waits without a word.
#[test]
fn busy_back_end_is_refused() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let setting = Setting::new();
    let back_end = setting.back_end(false);
    let _served = UnixStream::connect(back_end.socket()).unwrap();
    let begun = Instant::now();
    let words = ["closed the connection", "it may serve another front-end"];
    refused(&mut setting.with_disk(back_end.socket()), FAILED, &words);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_wrong_command_line() {
    let vmm = || Command::new(program("test-vmm").unwrap());
    for arguments in [
        &["run"][..],
        &["run", "--memory", "size=1G,backing=paper", "--source", "x"],
        &["run", "--memory", "size=4097", "--source", "x"],
        &["run", "--memory", "size=1G", "--source", "x", "--cpus", "0"],
        &["run", "--memory", "size=1G", "--source", "x", "--engine", "magic"],
        &["run", "--memory", "size=1G", "--source", "x", "--fill", "rate=0"],
        &["run", "--memory", "size=1G", "--source", "x", "--vhost-user", "net,socket=y"],
        &["make-image"],
        &["make-image", "--memory", "x", "--size", "1000"],
        &[],
    ] {
        refused(vmm().args(arguments), USAGE, &["test-vmm: "]);
    }
}

/// Returns whether the process has a socket.
fn has_socket(process: u32) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    entries.flatten().any(|entry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    })
}

/// A run that has its image open and waits for a stopped back-end.
struct Waiting {
    setting: Setting,
    back_end: BackEnd,
    vmm: Guarded,
}

impl Waiting {
    fn new() -> Self {
        let setting = Setting::new();
        let mut back_end = setting.back_end(true);
        signal(&mut back_end, libc::SIGSTOP);
        let mut command = setting.with_disk(back_end.socket());
        command.args(["--source-limit", "1"]).stderr(std::process::Stdio::piped());
        let mut vmm = Guarded::spawn(&mut command).unwrap();
        // By then it has opened the image as well. A moment later it waits for an answer.
        while !has_socket(vmm.id()) {
            if let Some(status) = vmm.try_wait().unwrap() {
                let mut said = String::new();
                let mut pipe = vmm.child().stderr.take().unwrap();
                std::io::Read::read_to_string(&mut pipe, &mut said).unwrap();
                panic!("it ended before it connected: {status}: {said}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(300));
        Waiting { setting, back_end, vmm }
    }

    /// Checks that the run fails, and that its last line (warnings may precede it) contains
    /// `words`.
    #[track_caller]
    fn fails_with(mut self, words: &str) {
        let status = self.vmm.wait(Duration::from_secs(60)).unwrap();
        let mut said = String::new();
        let mut pipe = self.vmm.child().stderr.take().unwrap();
        std::io::Read::read_to_string(&mut pipe, &mut said).unwrap();
        assert_eq!(status.code(), Some(FAILED), "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("test-vmm: ") && last.contains(words), "{said}");
    }
}

fn signal(back_end: &mut BackEnd, signal: libc::c_int) {
    let id = libc::pid_t::try_from(back_end.process().id()).unwrap();
    // SAFETY: the child has not been reaped, so its ID has not been reused.
    unsafe { libc::kill(id, signal) };
}

#[test]
fn permanent_source_failure_ends_the_run() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let mut run = Waiting::new();
    // The image loses its pages, and only then does the run continue and need them.
    let image = fs::OpenOptions::new().write(true).open(run.setting.path("memory.img")).unwrap();
    image.set_len(4096).unwrap();
    signal(&mut run.back_end, libc::SIGCONT);
    run.fails_with("ends at byte 4096");
}

#[test]
fn storage_server() {
    test_support::fuse::serve();
}

/// Starts a run whose source hangs in the middle; returns it with its source and its lines of
/// standard error. Its process can end only once the source answers or is dropped, because the
/// kernel does not interrupt the read.
fn hanging_run(arguments: &[&str]) -> Option<(Guarded, SlowFile, Receiver<String>)> {
    if let Some(why) = cannot_run() {
        skip(&why);
        return None;
    }
    let setting = Setting::new();
    let file = SlowFile::new(&fs::read(setting.path("memory.img")).unwrap())?;
    file.hold(4 << 20..5 << 20);
    let mut command = Command::new(program("test-vmm").unwrap());
    command.args(["run", "--memory", "size=8M", "--source"]).arg(file.path()).args(arguments);
    command.stderr(Stdio::piped());
    let mut vmm = Guarded::spawn(&mut command).unwrap();
    let (sender, said) = channel();
    let pipe = BufReader::new(vmm.child().stderr.take().unwrap());
    std::thread::spawn(move || {
        pipe.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    Some((vmm, file, said))
}

#[test]
fn hanging_source_ends_the_run() {
    let Some((mut vmm, file, said)) = hanging_run(&["--source-limit", "2"]) else { return };
    let _guard = file.answer_at_the_end();
    let mut lines = std::iter::from_fn(|| said.recv_timeout(Duration::from_secs(60)).ok());
    let last = lines.find(|line| line.starts_with("test-vmm: ")).expect("it says why it ends");
    let words = format!("of {}: no answer for ", file.path().display());
    assert!(last.contains("cannot read the page at offset") && last.contains(&words), "{last}");
    drop(file);
    let status = vmm.wait(Duration::from_secs(60)).unwrap();
    assert_eq!(status.code(), Some(FAILED));
}

#[test]
fn hanging_source_is_reported_once() {
    let begun = Instant::now();
    let Some((mut vmm, file, said)) = hanging_run(&[]) else { return };
    let _guard = file.answer_at_the_end();
    let mut lines = std::iter::from_fn(|| said.recv_timeout(Duration::from_secs(60)).ok());
    let told = |line: &String| line.contains("no answer for");
    assert!(lines.any(|line| told(&line)), "the run says nothing");
    assert!(begun.elapsed() >= Duration::from_secs(10));
    // Two further looks.
    std::thread::sleep(Duration::from_millis(2500));
    file.answer();
    assert!(vmm.wait(Duration::from_secs(60)).unwrap().success());
    assert_eq!(said.iter().filter(told).count(), 0);
}

#[test]
fn dying_back_end_ends_the_waiting_run() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let mut run = Waiting::new();
    signal(&mut run.back_end, libc::SIGKILL);
    run.fails_with("closed the connection");
}

/// An image is complete or absent, and replaces another one only by request.
#[test]
fn existing_image_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, "of another run").unwrap();
    let make = |disk: &Path, more: &[&str]| {
        let mut make = Command::new(program("test-vmm").unwrap());
        make.args(["make-image", "--size", "4M", "--memory"]).arg(&image);
        make.arg("--disk").arg(disk).args(more);
        make
    };
    let other = folder.path().join("disk");
    refused(&mut make(&other, &[]), FAILED, &["image: it exists", "--force"]);
    // The disk cannot be written, so the memory is not replaced either.
    let nowhere = Path::new("/nowhere/disk");
    refused(&mut make(nowhere, &["--force"]), FAILED, &["cannot write /nowhere/disk"]);
    refused(&mut make(Path::new("/dev/null"), &["--force"]), FAILED, &["not a regular file"]);
    assert_eq!(fs::read_to_string(&image).unwrap(), "of another run");
    let output =
        run(&mut make(&other, &["--force", "--progress"]), Duration::from_secs(60)).unwrap();
    assert!(output.status.success(), "{output:?}");
    for line in [
        "progress: memory image: 1024 of 1024 pages written (100.0 %)",
        "progress: disk image: 4096 of 4096 pages written (100.0 %)",
    ] {
        assert!(output.stderr.lines().any(|said| said == line), "{line}: {}", output.stderr);
    }
    assert_eq!(fs::metadata(&image).unwrap().len(), 4 << 20);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
}

/// Two spellings of one path, and two names of one file.
#[test]
fn one_file_for_both_images_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("old"), "of another run").unwrap();
    fs::hard_link(at("old"), at("linked")).unwrap();
    for (memory, disk) in [("new", "new"), ("new", "./new"), ("old", "old"), ("old", "linked")] {
        let mut make = Command::new(program("test-vmm").unwrap());
        make.args(["make-image", "--size", "4M", "--force", "--memory"]).arg(at(memory));
        make.arg("--disk").arg(at(disk));
        refused(&mut make, FAILED, &["--disk: cannot write ", "--memory writes it"]);
    }
    assert_eq!(fs::read_to_string(at("old")).unwrap(), "of another run");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// Whether a file system has files without a name, which are gone with their process.
fn has_unnamed_files(folder: &Path) -> bool {
    let mut options = fs::OpenOptions::new();
    options.write(true).custom_flags(libc::O_TMPFILE).open(folder).is_ok()
}

#[test]
fn ended_make_image_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let left = || fs::read_dir(folder.path()).unwrap().count();
    let killed = has_unnamed_files(folder.path()).then_some(libc::SIGKILL);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP].into_iter().chain(killed) {
        let mut make = Command::new(program("test-vmm").unwrap());
        make.args(["make-image", "--size", "3G", "--progress", "--memory"]);
        make.arg(folder.path().join("image")).arg("--disk").arg(folder.path().join("disk"));
        let mut make = Guarded::spawn(make.stderr(Stdio::piped())).unwrap();
        let mut said = BufReader::new(make.child().stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.starts_with("progress: memory image: "), "{line}");
        let id = libc::pid_t::try_from(make.id()).unwrap();
        // SAFETY: the child has not been reaped, so its ID has not been reused.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
        let rest: Vec<_> = said.lines().map_while(Result::ok).collect();
        let status = make.wait(Duration::from_secs(60)).unwrap();
        assert_eq!(left(), 0, "signal {signal}: {status}");
        if signal == libc::SIGKILL {
            assert_eq!(status.signal(), Some(signal));
        } else {
            let last = rest.last().map_or("", |line| line.as_str());
            assert!(last.starts_with("test-vmm: ended by SIG"), "{last}");
            assert_eq!(status.code(), Some(FAILED));
        }
    }
}
