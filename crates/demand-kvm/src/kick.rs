// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calling a vCPU's thread away from what it waits for.

use std::fmt;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering, fence};
use std::{io, mem, ptr};

use demand_memory::{Mapping, PAGE_SIZE, Waiter};
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// Why a vCPU could not be made one that can be kicked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KickError {
    /// The page that a vCPU shares with KVM could not be mapped.
    #[error("map the page that a vCPU shares with KVM: {0}; free memory")]
    Map(io::Error),
    /// The signal that ends `KVM_RUN` could not be set up.
    #[error("set up signal {signal}, which calls vCPUs away: {error}")]
    Signal {
        /// Number of the signal.
        signal: i32,
        /// What the system said.
        error: io::Error,
    },
    /// The program has a handler of its own for the signal.
    #[error("set up signal {0}, which calls vCPUs away: it has a handler; use another one there")]
    SignalTaken(i32),
}

/// Offset of `immediate_exit` in the shared page, in bytes.
const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);

const _: () = assert!(IMMEDIATE_EXIT < PAGE_SIZE as usize);

struct Inner {
    /// A mapping of our own of the page that the vCPU shares with KVM. kvm-ioctls makes `&mut`
    /// references to the whole of its own mapping while the vCPU's thread is at work; at an
    /// address that it does not know, one byte can be set from any thread all the same.
    shared: Mapping,
    /// The kernel's id of the vCPU's thread, 0 before it is known.
    thread: AtomicI32,
    waiter: Arc<Waiter>,
}

/// Calls the thread of one vCPU out of `KVM_RUN`, and out of waiting for a page.
///
/// The vCPU's thread calls [`attach`](Self::attach) once and passes [`waiter`](Self::waiter) to
/// the [`FaultHandler`](crate::FaultHandler); any thread that has a clone calls
/// [`kick`](Self::kick). The kick stays in force until the vCPU's thread calls
/// [`clear`](Self::clear): `KVM_RUN` returns `EINTR` at once, and waits for pages end with
/// [`FaultError::Kicked`](crate::FaultError::Kicked). So nothing is lost between two of its steps.
///
/// Who kicks first writes down what is wanted, then kicks; the vCPU's thread first clears, then
/// looks what is wanted.
///
/// Nothing of it costs anything while nobody kicks. The kick is the signal
/// [`signal`](Self::signal) after `immediate_exit` was set in the page that the vCPU shares with
/// KVM (`Documentation/virt/kvm/api.rst`, section 5, "The kvm_run structure"). That page stays
/// mapped, and the VM in being, until the last clone is dropped.
///
/// # Examples
///
/// ```
/// use demand_kvm::{VcpuKick, open_kvm};
///
/// let Ok(kvm) = open_kvm() else { return };
/// let vm = kvm.create_vm().unwrap();
/// let mut vcpu = vm.create_vcpu(0).unwrap();
/// let kick = VcpuKick::new(&vcpu).unwrap();
/// kick.attach();
/// // Mostly it is another thread that kicks. It does not matter whether the vCPU runs just now.
/// kick.clone().kick();
/// assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
/// kick.clear();
/// ```
#[derive(Clone)]
pub struct VcpuKick {
    inner: Arc<Inner>,
}

impl VcpuKick {
    /// Makes the vCPU one that can be kicked. The first call in a process installs a handler for
    /// [`signal`](Self::signal).
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: &VcpuFd) -> Result<Self, KickError> {
        install_handler()?;
        // SAFETY: the descriptor is the vCPU's, which is borrowed for longer than this.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let file = File::from(fd.try_clone_to_owned().map_err(KickError::Map)?);
        let shared = Mapping::shared(&file, PAGE_SIZE, false).map_err(KickError::Map)?;
        let inner = Inner { shared, thread: AtomicI32::new(0), waiter: Waiter::new() };
        Ok(VcpuKick { inner: Arc::new(inner) })
    }

    /// The signal that ends `KVM_RUN`: the first real-time signal that the C library leaves to
    /// programs.
    pub fn signal() -> i32 {
        libc::SIGRTMIN()
    }

    /// Says that the calling thread runs the vCPU from now on, and lets it receive the signal.
    pub fn attach(&self) {
        // SAFETY: the call has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        unblock_signal();
        self.inner.thread.store(thread, Ordering::SeqCst);
        // Pairs with the one in `kick`: either that sees the thread, or KVM sees the byte.
        fence(Ordering::SeqCst);
    }

    /// The waiter with which the vCPU's thread waits for pages.
    pub fn waiter(&self) -> &Arc<Waiter> {
        &self.inner.waiter
    }

    /// Calls the vCPU's thread away, now and until it calls [`clear`](Self::clear).
    pub fn kick(&self) {
        self.kick_self();
        fence(Ordering::SeqCst);
        let thread = self.inner.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // ESRCH: the thread has ended. Should its id have gone to another thread of this
            // process, that one receives a signal whose handler does nothing.
            // SAFETY: the call takes numbers only.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, Self::signal()) };
        }
    }

    /// The same on the vCPU's own thread, which needs no signal.
    pub(crate) fn kick_self(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        self.inner.waiter.kick();
    }

    /// Whether the vCPU was kicked and not cleared since.
    pub fn is_kicked(&self) -> bool {
        self.immediate_exit().load(Ordering::SeqCst) != 0
    }

    /// Lets the vCPU run again. To be called on its thread.
    pub fn clear(&self) {
        self.inner.waiter.clear_kick();
        self.immediate_exit().store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self.inner.shared.at(IMMEDIATE_EXIT as u64);
        // SAFETY: the byte lies in the shared page, which is mapped writable as long as `self`
        // lives. At this address it is only ever reached here, atomically; KVM reads it, and the
        // kernel's reads race with nothing in Rust's sense.
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }
}

impl fmt::Debug for VcpuKick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuKick")
            .field("thread", &self.inner.thread)
            .field("kicked", &self.is_kicked())
            .finish()
    }
}

/// All that the signal has to do is to arrive.
extern "C" fn ignore(_signal: libc::c_int) {}

fn install_handler() -> Result<(), KickError> {
    let signal = VcpuKick::signal();
    let failed = |error| KickError::Signal { signal, error };
    let handler = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: all zeros is a value of this C structure: no flags, an empty mask.
    let mut before: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: without a new action the call only fills `before`, which is of the right type.
    if unsafe { libc::sigaction(signal, ptr::null(), &mut before) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    match before.sa_sigaction {
        taken if taken == handler => return Ok(()),
        libc::SIG_DFL | libc::SIG_IGN => {}
        _ => return Err(KickError::SignalTaken(signal)),
    }
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler;
    // KVM_RUN answers EINTR all the same; a source's read on this thread goes on undisturbed.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing, so it may run at any time, on any thread.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

/// A thread inherits the mask of the one that started it, which may block signals.
fn unblock_signal() {
    // SAFETY: all zeros is a value of this C structure, and `sigemptyset` makes it an empty set;
    // the signal's number is valid, and the set is the calls' own. So none of them can fail.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, VcpuKick::signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}
