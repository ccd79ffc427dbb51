// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values in memory that the daemon shares with the processes that it forks.

use std::mem::{align_of, size_of};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicBool;

use crate::error::{Error, Result};

/// Types that may be shared with a forked process.
///
/// # Safety
///
/// All zero bytes must be a valid value of the type, and all of it must be atomic: another process
/// changes it at any time.
pub(crate) unsafe trait Shareable: Sync {}

// SAFETY: all zero bytes are `false`, and the type is atomic.
unsafe impl Shareable for AtomicBool {}

/// A value that processes forked after [`Shared::zeroed`] share with this one.
#[derive(Debug)]
pub(crate) struct Shared<T: Shareable>(NonNull<T>);

// SAFETY: the value is only ever used through shared references, and `Shareable` requires `Sync`.
unsafe impl<T: Shareable> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for Shared<T> {}

impl<T: Shareable> Shared<T> {
    /// Creates a value of zero bytes. `what` names the operation in the error.
    ///
    /// # Errors
    /// [`Error::System`] if the host cannot provide shared memory.
    pub(crate) fn zeroed(what: &'static str) -> Result<Self> {
        const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0) };
        // SAFETY: this creates a new anonymous mapping at an address that the kernel chooses, so it
        // affects no existing memory.
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
        // A new mapping is all zeros, which is a valid value of every `Shareable` type.
        NonNull::new(addr.cast()).map(Shared).ok_or_else(|| Error::last_os(what))
    }
}

impl<T: Shareable> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is large and aligned enough, initialized, and lives as long as
        // `self`.
        unsafe { self.0.as_ref() }
    }
}

impl<T: Shareable> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by `self`, has this size, and no reference to it outlives
        // `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<T>()) };
    }
}
