// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the examples as a user does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::can_run;
use demand_tests::process::{Guarded, Output, program, run};
use test_support::host::free_units;
use test_support::wait::until;

const LIMIT: Duration = Duration::from_secs(120);
/// Size of each example's memory, in bytes.
const SIZE: u64 = 16 << 20;
/// Its number of pages.
const PAGES: u64 = SIZE / 4096;

fn lazy_vm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lazy-vm"))
}

fn lazy_disk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lazy-disk"))
}

#[track_caller]
fn succeeds(command: &mut Command) -> Output {
    let output = run(command, LIMIT).unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.contains("\ncomplete and finished"), "{output:?}");
    assert!(output.stdout.contains("\nthe guest's sum is right: 0x"), "{output:?}");
    assert_eq!(output.stderr, "");
    output
}

/// Returns the number after `path` in the line that begins with `line`.
#[track_caller]
fn number(output: &Output, line: &str, path: &str) -> u64 {
    let found = output.stdout.lines().find(|text| text.starts_with(line));
    let after = found.and_then(|text| text.split_once(path)).map(|(_, rest)| rest);
    let number = after.and_then(|rest| rest.trim_start_matches([':', ' ']).split(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{output:?}"))
}

fn all(engine: Engine, backing: BackingKind) {
    if !can_run(engine, backing, SIZE) {
        return;
    }
    let arguments = ["--engine", engine.name(), "--backing", backing.name()];

    let output = succeeds(lazy_vm().args(arguments));
    // So far every page was fetched because the guest touched it. The guest keeps running while
    // they are counted, and the last page may be counted only afterwards.
    const HALF: &str = "half of memory summed";
    assert!(number(&output, HALF, "guest ") >= PAGES / 2 - 1, "{output:?}");
    assert_eq!(number(&output, HALF, "fill "), 0, "{output:?}");
    const END: &str = "complete and finished";
    let arrived = ["guest ", "kvm_internal ", "fill "].map(|path| number(&output, END, path));
    assert_eq!(arrived.iter().sum::<u64>(), PAGES, "{output:?}");
    assert!(arrived[2] > 0, "the fill has brought something in: {output:?}");

    program("vhost-device-blk").unwrap();
    let output = succeeds(lazy_disk().args(arguments));
    // At least the buffer that it writes to the disk.
    assert!(number(&output, "back_end", "back_end") >= 256, "{output:?}");
}

#[test]
fn under_uffd_on_shmem() {
    all(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn under_uffd_on_hugetlb_2m() {
    all(Engine::Uffd, BackingKind::Hugetlb2M);
}

#[test]
fn under_kvm_userfault_on_shmem() {
    all(Engine::KvmUserfault, BackingKind::Shmem);
}

#[test]
fn under_kvm_userfault_on_hugetlb_2m() {
    all(Engine::KvmUserfault, BackingKind::Hugetlb2M);
}

#[test]
fn under_kvm_attributes_on_shmem() {
    all(Engine::KvmAttributes, BackingKind::Shmem);
}

#[test]
fn under_kvm_attributes_on_hugetlb_2m() {
    all(Engine::KvmAttributes, BackingKind::Hugetlb2M);
}

/// An image can be kept, and used again.
#[test]
fn an_image_is_kept() {
    if !can_run(Engine::Uffd, BackingKind::Shmem, SIZE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("memory.img");
    succeeds(lazy_vm().args(["--engine", "uffd", "--mib", "1", "--keep"]).arg(&image));
    succeeds(lazy_vm().args(["--engine", "uffd", "--image"]).arg(&image));
}

/// Ctrl-C ends it in order, wherever the guest is.
#[test]
fn ctrl_c_ends_it() {
    if !can_run(Engine::Uffd, BackingKind::Shmem, SIZE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let output = std::fs::File::create(&said).unwrap();
    let mut command = lazy_vm();
    command.args(["--engine", "uffd", "--mib", "64"]).stdin(Stdio::null());
    command.stdout(output.try_clone().unwrap()).stderr(output);
    let mut process = Guarded::spawn(&mut command).unwrap();
    let text = || std::fs::read_to_string(&said).unwrap();
    until("the guest runs", || text().contains("running uffd"));
    let id = libc::pid_t::try_from(process.id()).unwrap();
    // SAFETY: the child has not been reaped, so its ID has not been reused.
    unsafe { libc::kill(id, libc::SIGINT) };
    let status = process.wait(Duration::from_secs(20)).unwrap();
    let text = text();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.ends_with("\nlazy-vm: ended by Ctrl-C\n"), "{text}");
}

#[track_caller]
fn is_refused(command: &mut Command, because: &[&str]) {
    let output = run(command, LIMIT).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.stderr.lines().count(), 1, "one line: {output:?}");
    for word in because {
        assert!(output.stderr.contains(word), "{word}: {output:?}");
    }
}

#[test]
fn bad_input_gives_one_line() {
    if !can_run(Engine::Uffd, BackingKind::Shmem, SIZE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no.img");
    let name = missing.to_str().unwrap();
    is_refused(lazy_vm().args(["--image", name]), &[name, "No such file", "use a readable"]);
    is_refused(lazy_vm().args(["--keep", "/no/such/folder/x"]), &["/no/such/folder/x"]);
    let long = tempfile::NamedTempFile::new().unwrap();
    long.as_file().set_len(1 << 40).unwrap();
    is_refused(lazy_vm().arg("--image").arg(long.path()), &["a smaller image"]);
    is_refused(lazy_disk().args(["--socket", name]), &[name, "start the back-end first"]);
    let odd = folder.path().join("odd.img");
    std::fs::write(&odd, [0xf4; 4096]).unwrap();
    let odd: &Path = &odd;
    let huge = ["--backing", "hugetlb-2m", "--image"];
    is_refused(lazy_vm().args(huge).arg(odd), &["not a multiple", "round it"]);
}

#[test]
fn too_few_huge_pages_give_one_line() {
    if !can_run(Engine::Uffd, BackingKind::Shmem, SIZE) {
        return;
    }
    const MOST: u64 = 2 << 30;
    if free_units(BackingKind::Hugetlb2M) >= MOST / BackingKind::Hugetlb2M.unit() {
        return println!("SKIPPED: this machine has more huge pages than the example can ask for");
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(MOST).unwrap();
    let arguments = ["--engine", "uffd", "--backing", "hugetlb-2m", "--image"];
    is_refused(
        lazy_vm().args(arguments).arg(image.path()),
        &["hugetlb-2m", "Cannot allocate memory", "vm.nr_hugepages"],
    );
}
