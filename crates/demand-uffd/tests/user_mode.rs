// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a process without permissions maps lazily for its own reads, in a child process that
//! runs as such a user.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::thread;

use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, to_usize};
use demand_source::LocalFile;
use demand_uffd::{
    Access, Features, LazyMap, LazyMapError, LazyMapOptions, OpenError, Userfaultfd, probe,
    probe_user_mode,
};
use test_support::host::{is_lab, skip};
use test_support::image::{Near, page_of};
use test_support::wait::{PATIENCE, until};

const PAGES: u64 = 64;
const PAGE: usize = 4096;

/// The user and group without permissions.
const NOBODY: libc::uid_t = 65534;

/// The variable that names the part that a child process runs.
const PART: &str = "USER_MODE_PART";

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// One page per fault.
const SINGLE: LazyMapOptions = LazyMapOptions { around: 0, readahead: 0 };

/// Creates an image whose last page is not whole.
fn image() -> (tempfile::NamedTempFile, Vec<u8>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut content: Vec<u8> = (0..PAGES).flat_map(page_of).collect();
    content.truncate(content.len() - 5);
    file.as_file().write_all_at(&content, 0).unwrap();
    (file, content)
}

/// Runs a part of these tests in a process of its own.
fn in_child(part: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child_process", "--exact", "--nocapture", "--test-threads=1"]);
    let output = command.env(PART, part).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{part}: {}", text.concat());
    assert!(text[0].contains("part done"), "{part}: {}", text.concat());
}

/// Does nothing unless it is started by [`in_child`].
#[test]
fn child_process() {
    match std::env::var(PART).as_deref() {
        Ok("without-permissions") => check_without_permissions(),
        Ok("sysctl") => check_with_sysctl(),
        _ => return,
    }
    println!("part done");
}

fn become_nobody() {
    // SAFETY: the calls change the identity of all threads of this process, and no memory.
    let results = unsafe {
        [libc::setgroups(0, std::ptr::null()), libc::setgid(NOBODY), libc::setuid(NOBODY)]
    };
    assert_eq!(results, [0; 3], "{}", std::io::Error::last_os_error());
}

fn check_without_permissions() {
    let (file, content) = image();
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    become_nobody();
    let error = Userfaultfd::open(Features::GUEST_MEMORY).unwrap_err();
    assert!(matches!(error, OpenError::NotPermitted { .. }), "{error}");
    assert!(probe().is_err());
    let user_mode = probe_user_mode().unwrap();
    assert_eq!(user_mode.access, Access::UserMode);
    assert!(user_mode.can_page(BackingKind::Shmem), "{user_mode:?}");

    let map = LazyMap::new(source, SINGLE).unwrap();
    assert_eq!(map.access(), Access::UserMode);
    assert_eq!(map.len(), content.len());
    assert_eq!(map[7 * PAGE..8 * PAGE], content[7 * PAGE..8 * PAGE]);
    assert_eq!(map.bitmap().count_missing(demand_memory::PageRange::new(0, PAGES)), PAGES - 1);

    // A system call is given the page that is present, and stops before the next.
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let error = writer.write(&map[8 * PAGE..9 * PAGE]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    assert!(map.bitmap().is_missing(8));
    assert_eq!(writer.write(&map[7 * PAGE..9 * PAGE]).unwrap(), PAGE);
    let mut bytes = [0; PAGE];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, content[7 * PAGE..8 * PAGE]);
    // Once a byte of the page was read, the call gets all of it.
    assert_eq!(map[8 * PAGE], content[8 * PAGE]);
    writer.write_all(&map[8 * PAGE..9 * PAGE]).unwrap();
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, content[8 * PAGE..9 * PAGE]);
    assert!(*map == content);
}

fn check_with_sysctl() {
    let (file, content) = image();
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    become_nobody();
    assert_eq!(probe().unwrap().access, Access::SystemCall);
    let map = LazyMap::new(source, SINGLE).unwrap();
    assert_eq!(map.access(), Access::SystemCall);
    // A system call waits for the pages.
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&map[8 * PAGE..9 * PAGE]).unwrap();
    let mut bytes = [0; PAGE];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, content[8 * PAGE..9 * PAGE]);
}

fn is_root() -> bool {
    // SAFETY: the call has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn permissions_decide_the_access() {
    let setting = fs::read_to_string(SYSCTL).unwrap_or_default();
    if !is_root() || setting.trim() != "0" {
        return skip("needs root, and vm.unprivileged_userfaultfd=0");
    }
    in_child("without-permissions");
    // The setting belongs to the whole machine.
    if is_lab() {
        fs::write(SYSCTL, "1").unwrap();
        let outcome = std::panic::catch_unwind(|| in_child("sysctl"));
        fs::write(SYSCTL, setting).unwrap();
        outcome.unwrap();
    }
}

#[test]
fn lazy_map_equals_its_image() {
    let (file, content) = image();
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    for options in [SINGLE, LazyMapOptions::default()] {
        let map = LazyMap::in_user_mode(source.clone(), options).unwrap();
        assert_eq!(map.access(), Access::UserMode);
        assert!(*map == content);
        let faults = || map.stats().path(FaultPath::Vmm).faults;
        // Readahead counts as fill.
        assert_eq!(map.stats().pages_arrived(), PAGES);
        // A fault is counted after its faulter is woken.
        let wanted = PAGES * PAGE_SIZE / options.around.max(PAGE_SIZE);
        until("all faults are counted", || faults() >= wanted);
        // Readahead may publish pages of a fault that is being read: then it is repeated.
        let repeated = if options.readahead > 0 { wanted } else { 0 };
        assert!(faults() <= wanted + repeated, "{} faults", faults());
    }
    assert!(matches!(LazyMap::new(Arc::new(Near(0)), SINGLE), Err(LazyMapError::Empty)));
}

#[test]
fn child_process_gets_no_zeros() {
    let (file, _) = image();
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    let map = LazyMap::in_user_mode(source, SINGLE).unwrap();
    let byte: *const u8 = &raw const map[to_usize(7 * PAGE_SIZE)];
    // SAFETY: the child calls nothing but `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the byte is mapped in the parent; here the read ends the process, which the test
        // wants to see. `_exit` runs no code of this process.
        unsafe { libc::_exit(i32::from(byte.read_volatile())) };
    }
    let mut status = 0;
    // SAFETY: the call writes `status`.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
    assert!(map.bitmap().is_missing(7));
}

#[test]
fn child_that_drops_the_map_ends_nothing() {
    let (file, content) = image();
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    let mut map = Some(LazyMap::in_user_mode(source, SINGLE).unwrap());
    // SAFETY: the child drops the map, whose locks no other thread holds, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(map.take());
        // SAFETY: ends the child at once; nothing of it is needed any more.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: the call writes `status`.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    // On a thread of its own: without the service the read would never end.
    let (sender, read) = mpsc::channel();
    thread::spawn(move || {
        let _ = sender.send(*map.unwrap() == content);
    });
    assert_eq!(read.recv_timeout(PATIENCE), Ok(true));
}
