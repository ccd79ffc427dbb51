// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the examples as a user does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bare_guest::summing;
use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::can_run;
use demand_tests::process::{Guarded, Output, program, run};
use test_support::fuse::SlowFile;
use test_support::host::{free_units, has_kvm, skip};
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
    // they are counted: each thread that serves faults may count its last ones only afterwards.
    const HALF: &str = "half of memory summed";
    assert!(number(&output, HALF, "guest ") >= PAGES / 2 - 16, "{output:?}");
    assert_eq!(number(&output, HALF, "fill "), 0, "{output:?}");
    const END: &str = "complete and finished";
    let arrived = ["guest ", "kvm_internal ", "fill "].map(|path| number(&output, END, path));
    assert_eq!(arrived.iter().sum::<u64>(), PAGES, "{output:?}");
    assert!(arrived[2] > 0, "the fill has brought something in: {output:?}");

    program("vhost-device-blk").unwrap();
    let output = succeeds(lazy_disk().args(arguments));
    // At least the buffer that it writes to the disk.
    assert!(number(&output, "arrived: ", "back_end ") >= 256, "{output:?}");
}

#[test]
fn under_uffd_on_shmem() {
    all(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn under_uffd_poison_on_shmem() {
    all(Engine::UffdPoison, BackingKind::Shmem);
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

#[test]
fn storage_server() {
    test_support::fuse::serve();
}

/// Ctrl-C ends it in order, here while the guest waits for a page.
#[test]
fn ctrl_c_ends_it() {
    if !can_run(Engine::Uffd, BackingKind::Shmem, SIZE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, said) = (folder.path().join("memory.img"), folder.path().join("said"));
    summing::write_walker(&image, 1 << 20).unwrap();
    let Some(file) = SlowFile::new(&std::fs::read(image).unwrap()) else { return };
    let _guard = file.answer_at_the_end();
    // The guest sums from the top down.
    file.hold(0..256 << 10);
    let output = std::fs::File::create(&said).unwrap();
    let mut command = lazy_vm();
    command.args(["--engine", "uffd", "--image"]).arg(file.path()).stdin(Stdio::null());
    command.stdout(output.try_clone().unwrap()).stderr(output);
    let mut process = Guarded::spawn(&mut command).unwrap();
    until("the guest waits", || file.waiting() > 0);
    let id = libc::pid_t::try_from(process.id()).unwrap();
    // SAFETY: the child has not been reaped, so its ID has not been reused.
    unsafe { libc::kill(id, libc::SIGINT) };
    let text = || std::fs::read_to_string(&said).unwrap();
    until("it says why it ends", || text().ends_with("\nlazy-vm: ended by Ctrl-C\n"));
    // The kernel does not interrupt the read.
    file.answer();
    let status = process.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(status.code(), Some(1), "{}", text());
}

/// The plain VMM, and the same made lazy, sum the same image and say the same.
#[test]
fn plain_vm_is_made_lazy() {
    if !has_kvm() {
        return skip("/dev/kvm is needed");
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("memory.img");
    summing::write_walker(&image, SIZE).unwrap();
    let said = [env!("CARGO_BIN_EXE_plain-vm"), env!("CARGO_BIN_EXE_plain-vm-lazy")].map(|vmm| {
        let output = run(Command::new(vmm).arg("--image").arg(&image), LIMIT).unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        output.stdout
    });
    assert_eq!(said[0], said[1]);
    assert!(said[0].contains("\nthe guest's sum is right: 0x"), "{said:?}");
}

/// The diffs in `docs/LAZY.md`, in their order, turn the plain VMM into the lazy one.
#[test]
fn guided_diff_is_the_difference() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let (plain, lazy) = (read("src/bin/plain-vm.rs"), read("src/bin/plain-vm-lazy.rs"));
    let mut plain: Vec<&str> = plain.lines().collect();
    let mut lazy: Vec<&str> = lazy.lines().collect();
    let guide = read("../docs/LAZY.md");
    let mut changed = 0;
    for part in guide.split("```diff\n").skip(1) {
        let (diff, _) = part.split_once("```").unwrap();
        let side = |other: char| -> Vec<&str> {
            let lines = diff.lines().filter(|line| !line.starts_with(other));
            lines.map(|line| line.get(1..).unwrap_or_default()).collect()
        };
        let (old, new) = (side('+'), side('-'));
        let at = plain.windows(old.len()).position(|lines| lines == old);
        let at = at.unwrap_or_else(|| panic!("plain-vm.rs lacks:\n{diff}"));
        assert_eq!(plain[..at], lazy[..at], "before:\n{diff}");
        assert!(lazy[at..].starts_with(&new), "plain-vm-lazy.rs lacks:\n{diff}");
        plain.drain(..at + old.len());
        lazy.drain(..at + new.len());
        changed += diff.lines().filter(|line| line.starts_with('+')).count();
    }
    assert_eq!(plain, lazy, "after the last diff");
    assert!(changed <= 20, "{changed} lines are not about 20");
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
