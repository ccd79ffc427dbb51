// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kicks a vCPU's thread out of `KVM_RUN` and out of its waits for pages.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering, fence};
use std::{io, mem, ptr};

use demand_memory::{Mapping, PAGE_SIZE, Waiter, to_usize};
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::unblock_signal;

/// Errors from making a vCPU kickable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KickError {
    /// The page that a vCPU shares with KVM could not be mapped.
    #[error("cannot map the page that a vCPU shares with KVM: {0}; free memory")]
    Map(#[source] io::Error),
    /// The handler of the signal that ends `KVM_RUN` could not be installed.
    #[error("cannot set up signal {signal} to kick vCPUs: {source}")]
    Signal {
        /// Number of the signal.
        signal: i32,
        /// Error from the operating system.
        source: io::Error,
    },
    /// The program already has its own handler for the signal.
    #[error(
        "cannot set up signal {0} to kick vCPUs: it already has a handler; use another signal there"
    )]
    SignalTaken(i32),
}

/// Offset of `immediate_exit` in the `kvm_run` page, in bytes.
const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);

const _: () = assert!(IMMEDIATE_EXIT < to_usize(PAGE_SIZE));

thread_local! {
    /// The kernel's id of this thread once it has attached to a vCPU, which unblocks the signal.
    static ATTACHED: Cell<i32> = const { Cell::new(0) };
}

struct Inner {
    /// A second mapping of the page that the vCPU shares with KVM. kvm-ioctls creates `&mut`
    /// references to its whole mapping while the vCPU's thread runs; through this other address,
    /// which kvm-ioctls does not know, any thread can set one byte of the page.
    shared: Mapping,
    /// The kernel's id of the vCPU's thread; 0 until the thread attaches.
    thread: AtomicI32,
    waiter: Waiter,
}

/// Kicks the thread of one vCPU out of `KVM_RUN`, and out of its waits for pages.
///
/// [`DemandVcpu::step`](crate::DemandVcpu::step) attaches the thread that calls it. Code that calls
/// `KVM_RUN` itself calls [`attach`](Self::attach) once on the vCPU's thread, and passes
/// [`waiter`](Self::waiter) to the [`FaultHandler`](crate::FaultHandler).
///
/// Any thread with a clone calls [`kick`](Self::kick). The kick stays in force until the vCPU's
/// thread calls [`clear`](Self::clear): `KVM_RUN` returns `EINTR` at once, and waits for pages end
/// with [`FaultError::Kicked`](crate::FaultError::Kicked). So a kick between two steps of the vCPU
/// is not lost.
///
/// The kicking thread first stores its request, then kicks. The vCPU's thread first clears the
/// kick, then checks for requests.
///
/// Without a kick this costs nothing. A kick sets `immediate_exit` in the page that the vCPU shares
/// with KVM, then sends the signal [`signal`](Self::signal) (`Documentation/virt/kvm/api.rst`,
/// section 5, "The kvm_run structure"). That page stays mapped, and the VM exists, until the last
/// clone is dropped.
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
/// // Normally another thread kicks. The kick works whether or not the vCPU is running.
/// kick.clone().kick();
/// assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
/// kick.clear();
/// ```
#[derive(Clone)]
pub struct VcpuKick {
    inner: Arc<Inner>,
}

impl VcpuKick {
    /// Makes a vCPU kickable. The first call in a process installs a handler for
    /// [`signal`](Self::signal).
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: &VcpuFd) -> Result<Self, KickError> {
        install_handler()?;
        // SAFETY: the descriptor belongs to the vCPU, which is borrowed for longer than this.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let file = File::from(fd.try_clone_to_owned().map_err(KickError::Map)?);
        let shared = Mapping::shared(&file, PAGE_SIZE).map_err(KickError::Map)?;
        let inner = Inner { shared, thread: AtomicI32::new(0), waiter: Waiter::new() };
        Ok(VcpuKick { inner: Arc::new(inner) })
    }

    /// Returns the signal that ends `KVM_RUN`: the first real-time signal that the C library leaves
    /// to programs.
    pub fn signal() -> i32 {
        libc::SIGRTMIN()
    }

    /// Declares that the calling thread runs the vCPU from now on, and unblocks the signal on it.
    pub fn attach(&self) {
        // SAFETY: the call has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        // A thread inherits its parent's mask, which may block it.
        unblock_signal(Self::signal()).expect("the signal's number is valid");
        ATTACHED.set(thread);
        self.inner.thread.store(thread, Ordering::SeqCst);
        // Pairs with the fence in `kick`: either `kick` reads this thread id, or KVM reads the byte
        // that `kick` has set.
        fence(Ordering::SeqCst);
    }

    /// Returns the kernel's id of the calling thread, which is attached to a vCPU.
    #[inline]
    pub(crate) fn thread() -> i32 {
        ATTACHED.get()
    }

    /// [Attaches](Self::attach) the calling thread unless it is attached.
    #[inline]
    pub(crate) fn attach_once(&self) {
        let here = ATTACHED.get();
        if here == 0 || here != self.inner.thread.load(Ordering::Relaxed) {
            self.attach();
        }
    }

    /// Returns the waiter that the vCPU's thread uses to wait for pages.
    pub fn waiter(&self) -> &Waiter {
        &self.inner.waiter
    }

    /// Kicks the vCPU's thread. The kick stays in force until the thread calls
    /// [`clear`](Self::clear).
    pub fn kick(&self) {
        self.kick_self();
        fence(Ordering::SeqCst);
        let thread = self.inner.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // ESRCH: the thread has ended. If another thread of this process has got its id since,
            // that thread receives a signal whose handler does nothing.
            // SAFETY: the call takes numbers only.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, Self::signal()) };
        }
    }

    /// Kicks the calling thread's own vCPU, which needs no signal.
    pub(crate) fn kick_self(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        self.inner.waiter.kick();
    }

    /// Returns whether a kick is in force.
    pub fn is_kicked(&self) -> bool {
        self.immediate_exit().load(Ordering::SeqCst) != 0
    }

    /// Clears the kick, so that the vCPU can run again. Call it on the vCPU's thread.
    pub fn clear(&self) {
        self.inner.waiter.clear_kick();
        self.immediate_exit().store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self.inner.shared.at(IMMEDIATE_EXIT as u64);
        // SAFETY: the byte lies in the shared page, which stays mapped writable while `self` lives.
        // Only this function reaches it through this address, and only atomically. KVM reads the
        // byte in the kernel, which cannot be a data race in Rust's memory model.
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

/// Does nothing: the signal only has to arrive.
extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the handler, unless the signal has another one.
///
/// `register_signal_handler` of vmm-sys-util would replace the program's own handler, and would
/// interrupt reads of a source on this thread, because it does not set `SA_RESTART`.
fn install_handler() -> Result<(), KickError> {
    let signal = VcpuKick::signal();
    let failed = |source| KickError::Signal { signal, source };
    let handler = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: all zeros is a valid value of this C structure: no flags, an empty mask.
    let mut before: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: without a new action the call only fills `before`, which has the right type.
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
    // KVM_RUN still returns EINTR; a source's read on this thread is restarted.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing, so it may run at any time, on any thread.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}
