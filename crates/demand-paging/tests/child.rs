// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Child processes of a VMM: what they inherit, and what they do with it, changes nothing.
//!
//! A program of its own, because each test forks it or looks at all of its descriptors.

mod common;

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use common::*;
use demand_paging::FillRate;

/// Time in which the guest sums its memory, however busy the machine is.
const SUMMED: Duration = Duration::from_secs(60);

/// Runs `child` in a child process, and waits for its end.
fn fork(child: impl FnOnce()) {
    // SAFETY: the child has a copy of all memory and this thread alone, and ends after `child`. A
    // lock that another thread holds at this moment would keep it waiting, and not harm it; the
    // other threads rest, because nothing asks for a page.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child();
        // SAFETY: ends the child at once; nothing of it is needed any more.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: the call writes `status`.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0, "the child ended otherwise");
}

/// Returns the descriptors that a program started by this process would inherit.
fn inheritable() -> BTreeSet<RawFd> {
    let names = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = names.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
    let inherited = |fd: &RawFd| {
        // SAFETY: fcntl with this command touches no memory; the listing's own descriptor is
        // closed by now, which is an error.
        let flags = unsafe { libc::fcntl(*fd, libc::F_GETFD) };
        flags >= 0 && flags & libc::FD_CLOEXEC == 0
    };
    numbers.collect::<Vec<_>>().into_iter().filter(inherited).collect()
}

#[test]
fn children_change_nothing() {
    let Some(image) = image() else { return };
    let before = inheritable();
    each(image.path(), |builder, _| {
        let vm = attach(builder.fill(FillRate::BytesPerSecond(1)).build().unwrap()).unwrap();
        assert_eq!(inheritable(), before, "a program that this process starts inherits more");
        let mut vcpu = vcpu(&vm);
        while !matches!(vcpu.step().unwrap(), demand_paging::Step::Exit(_)) {}
        let mut parts = Some((vm.memory().clone(), vm, vcpu));
        // A child that returns instead of ending drops all that it has inherited.
        fork(|| drop(parts.take()));
        let (_memory, vm, mut vcpu) = parts.unwrap();
        // A guest that waits for ever cannot be dropped.
        let (sender, summed) = channel();
        thread::spawn(move || drop(sender.send((run(&mut vcpu), vcpu))));
        let (sum, _vcpu) = summed.recv_timeout(SUMMED).expect("the guest ends");
        check(image.path(), sum.unwrap()).unwrap();
        drop(vm);
    });
}
