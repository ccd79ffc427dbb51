// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where no userfaultfd can be opened: memory is read first, or the error says so.
//!
//! A filter of system calls refuses userfaultfds to the test's thread, and to those that it starts.

mod common;

use std::thread;

use common::*;
use demand_paging::demand_kvm;
use demand_paging::demand_uffd::{self, ArmGuestError, OpenError};
use demand_paging::{Engine, EngineChoice, Error, Lazy};

/// The request that opens a userfaultfd through `/dev/userfaultfd`: `_IO(0xaa, 0)`.
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;

/// Refuses userfaultfds to this thread, and to all threads that it starts, with `EPERM`.
fn refuse_userfaultfd() {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let filter = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt,
        jf,
        k,
    };
    let load = |offset| filter(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset);
    let equal = |value, jt, jf| filter(BPF_JMP | BPF_JEQ | BPF_K, jt, jf, value);
    let answer = |value| filter(BPF_RET | BPF_K, 0, 0, value);
    let refused = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let call = |number: libc::c_long| u32::try_from(number).unwrap();
    let mut program = [
        load(0), // The number of the call.
        equal(call(libc::SYS_userfaultfd), 3, 0),
        equal(call(libc::SYS_ioctl), 0, 3),
        load(24), // The low half of the second argument.
        equal(USERFAULTFD_IOC_NEW, 0, 1),
        answer(refused),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the calls change only what this thread and its children may do; the program outlives
    // them.
    let outcome = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    let refused = demand_uffd::probe().unwrap_err();
    assert!(matches!(refused, OpenError::NotPermitted { .. }), "{refused}");
}

/// Runs a test on a thread that gets no userfaultfd.
fn without_userfaultfd(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        refuse_userfaultfd();
        test();
    });
    thread.join().unwrap();
}

/// Returns whether this host's best engine traps everything without a userfaultfd.
fn traps_all() -> bool {
    demand_kvm::probe().traps_own_accesses(Engine::KvmUserfault)
}

#[test]
fn memory_that_is_off_needs_none() {
    let Some(image) = image() else { return };
    without_userfaultfd(move || {
        let memory = lazy(image.path()).lazy(Lazy::Off).build().unwrap();
        let vm = attach(memory).unwrap();
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

#[test]
fn auto_reads_first_or_needs_none() {
    let Some(image) = image() else { return };
    without_userfaultfd(move || {
        let memory = lazy(image.path()).build().unwrap();
        let engine = traps_all().then_some(Engine::KvmUserfault);
        assert_eq!(memory.engine(), engine);
        let vm = attach(memory).unwrap();
        assert_eq!(vm.is_finished(), engine.is_none());
        let sum = run(&mut vcpu(&vm)).unwrap();
        check(image.path(), sum).unwrap();
    });
}

#[test]
fn required_laziness_is_an_error() {
    let Some(image) = image() else { return };
    without_userfaultfd(move || {
        for engine in engines() {
            if engine == Engine::KvmUserfault && traps_all() {
                continue;
            }
            // A named engine is as good as a requirement.
            for lazy_mode in [Lazy::Require, Lazy::Auto] {
                let builder = lazy(image.path()).engine(EngineChoice::Only(engine));
                let error = builder.lazy(lazy_mode).build().unwrap_err();
                assert!(matches!(&error, Error::Arm(ArmGuestError::Open(_))), "{error}");
                assert!(error.to_string().contains("/dev/userfaultfd"), "{error}");
            }
        }
    });
}

#[test]
fn engine_that_traps_all_needs_none() {
    let Some(image) = image() else { return };
    if !traps_all() {
        return test_support::host::skip("KVM must respect the bitmap in its own accesses");
    }
    without_userfaultfd(move || {
        each(image.path(), |builder, (engine, _)| {
            if engine == Engine::KvmUserfault {
                let vm = attach(builder.build().unwrap()).unwrap();
                let sum = run(&mut vcpu(&vm)).unwrap();
                check(image.path(), sum).unwrap();
            }
        });
    });
}
