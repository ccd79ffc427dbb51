// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values in memory that the daemon shares with the processes it forks.

use std::mem::{align_of, size_of};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicBool;

use crate::{Error, Result};

/// Types that may be shared with a forked process.
///
/// # Safety
///
/// All zero bytes must be a value of the type, and all of it must be atomic: another process
/// changes it at any time.
pub(crate) unsafe trait Shareable: Sync {}

// SAFETY: zero is `false`, and the type is an atomic.
unsafe impl Shareable for AtomicBool {}

/// A value that a process forked after [`Shared::zeroed`] sees and changes, too.
#[derive(Debug)]
pub(crate) struct Shared<T: Shareable>(NonNull<T>);

// SAFETY: the value is only ever used through shared references, and `Shareable` is `Sync`.
unsafe impl<T: Shareable> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for Shared<T> {}

impl<T: Shareable> Shared<T> {
    /// A value of zeros. `what` names it in the error.
    ///
    /// # Errors
    /// [`Error::System`] if the host has no memory to share.
    pub(crate) fn zeroed(what: &'static str) -> Result<Self> {
        const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0) };
        // SAFETY: a new anonymous mapping, which touches nothing that exists.
        let addr = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os(what));
        }
        // A fresh mapping is all zeros, which `Shareable` says is a value.
        NonNull::new(addr.cast()).map(Shared).ok_or_else(|| Error::last_os(what))
    }
}

impl<T: Shareable> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is large and aligned enough, initialized, and lives as long as self.
        unsafe { self.0.as_ref() }
    }
}

impl<T: Shareable> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this size, and no reference to it outlives self.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<T>()) };
    }
}
