// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The signal by which a vCPU's thread learns that its vCPU has met a marker.

use std::io;
use std::mem::{self, MaybeUninit};
use std::ptr;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

use crate::VcpuKick;

// kvm-ioctls lacks this request. Its number counts only the structure's first member. Source:
// Documentation/virt/kvm/api.rst, section 4.17, "KVM_SET_SIGNAL_MASK".
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

/// `struct kvm_signal_mask` with the kernel's set of signals.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; KERNEL_SET as usize],
}

/// Length of the kernel's set of signals, in bytes: the first part of the C library's.
const KERNEL_SET: u32 = 8;

const _: () = assert!(size_of::<libc::sigset_t>() >= KERNEL_SET as usize);

/// The SIGBUS that KVM sends to the vCPU's own thread at a page that the host's mapping cannot
/// provide (`BUS_MCEERR_AR`).
///
/// The thread keeps the signal blocked, so that no handler runs and nothing ends the process. Only
/// `KVM_RUN` opens it: it returns `EINTR`, and the signal is [taken](Self::take).
#[derive(Debug, Default)]
pub(crate) struct MarkerSignal {
    /// The thread that keeps the signal blocked for this vCPU, and whether it had it blocked before.
    blocked: Option<(i32, bool)>,
}

/// A SIGBUS that ended `KVM_RUN`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BusError {
    /// The vCPU touched a page that the mapping at this host address cannot provide.
    Vcpu(u64),
    /// It is not about an access of the vCPU.
    Other,
}

impl MarkerSignal {
    /// Expects the signal on the calling thread, which runs the vCPU and is attached to its kick,
    /// or expects it no longer.
    #[inline]
    pub(crate) fn expect(&mut self, vcpu: &VcpuFd, expected: bool) -> io::Result<()> {
        match self.blocked {
            None if !expected => Ok(()),
            Some((thread, _)) if expected && thread == VcpuKick::thread() => Ok(()),
            _ => self.change(vcpu, expected),
        }
    }

    #[cold]
    fn change(&mut self, vcpu: &VcpuFd, expected: bool) -> io::Result<()> {
        let here = VcpuKick::thread();
        if !expected {
            let blocked = self.blocked.take();
            // SAFETY: a null pointer removes the vCPU's mask; nothing is read.
            if unsafe { ioctl_with_val(vcpu, KVM_SET_SIGNAL_MASK(), 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            // A signal that is left would end the process.
            while self.take().is_some() {}
            if blocked == Some((here, false)) {
                mask(libc::SIG_UNBLOCK, &only_sigbus())?;
            }
            return Ok(());
        }
        let mut set = mask(libc::SIG_BLOCK, &only_sigbus())?;
        // SAFETY: `set` is a set of signals, and the numbers are valid.
        let was_blocked = unsafe {
            let was_blocked = libc::sigismember(&set, libc::SIGBUS) == 1;
            libc::sigdelset(&mut set, libc::SIGBUS);
            libc::sigdelset(&mut set, VcpuKick::signal());
            was_blocked
        };
        let mut argument = SignalMask { len: KERNEL_SET, set: [0; KERNEL_SET as usize] };
        // SAFETY: the C library's set begins with the kernel's, and is no shorter.
        unsafe {
            let from = ptr::from_ref(&set).cast::<u8>();
            ptr::copy_nonoverlapping(from, argument.set.as_mut_ptr(), argument.set.len());
        }
        // SAFETY: the request reads this structure, and the `len` bytes of the set in it.
        if unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &argument) } != 0 {
            let error = io::Error::last_os_error();
            if !was_blocked {
                mask(libc::SIG_UNBLOCK, &only_sigbus())?;
            }
            return Err(error);
        }
        self.blocked = Some((here, was_blocked));
        Ok(())
    }

    /// [Takes](Self::take) the signal, if this vCPU's thread expects it.
    #[inline]
    pub(crate) fn take_if_expected(&self) -> Option<BusError> {
        self.blocked.and_then(|_| self.take())
    }

    /// Takes the signal that has ended `KVM_RUN`, if there is one.
    pub(crate) fn take(&self) -> Option<BusError> {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
        // SAFETY: all pointers are valid for the call, which waits for no time.
        if unsafe { libc::sigtimedwait(&only_sigbus(), info.as_mut_ptr(), &now) } != libc::SIGBUS {
            return None;
        }
        // SAFETY: the call has filled it.
        let info = unsafe { info.assume_init() };
        if info.si_code != libc::BUS_MCEERR_AR {
            return Some(BusError::Other);
        }
        // SAFETY: a SIGBUS with this code has an address.
        Some(BusError::Vcpu(unsafe { info.si_addr() } as u64))
    }
}

/// Changes the calling thread's blocked signals; returns those before.
fn mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: both pointers are valid for the call.
    match unsafe { libc::pthread_sigmask(how, set, before.as_mut_ptr()) } {
        // SAFETY: the call has filled it.
        0 => Ok(unsafe { before.assume_init() }),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn only_sigbus() -> libc::sigset_t {
    // SAFETY: all zeros is a valid value, an empty set, to which a valid number is added.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGBUS);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_has_the_kernels_layout() {
        assert_eq!(size_of::<SignalMask>(), 12);
        assert_eq!(KVM_SET_SIGNAL_MASK(), 0x4004_ae8b);
    }

    #[test]
    fn sent_signal_is_not_the_vcpus() {
        let before = mask(libc::SIG_BLOCK, &only_sigbus()).unwrap();
        let signal = MarkerSignal::default();
        assert_eq!(signal.take(), None);
        // SAFETY: the signal is blocked on this thread, to which it is sent.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGBUS) };
        assert_eq!(signal.take(), Some(BusError::Other));
        assert_eq!(signal.take(), None);
        mask(libc::SIG_SETMASK, &before).unwrap();
    }
}
