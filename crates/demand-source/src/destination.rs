// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory on loan to a source.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory that a source may write, and nothing else.
///
/// It may be memory that other processes map as well, so it is never turned into a Rust slice:
/// bytes go in by copy, or straight from a file.
///
/// # Examples
///
/// ```
/// use demand_source::Destination;
///
/// let mut page = [0u8; 4096];
/// let mut destination = Destination::from(&mut page[..]);
/// destination.write_at(8, &[1, 2, 3]);
/// assert_eq!(page[7..12], [0, 1, 2, 3, 0]);
/// ```
pub struct Destination<'a> {
    address: NonNull<u8>,
    len: usize,
    // Keeps the memory mapped where the loan has no lifetime of its own.
    owner: Option<Arc<dyn Any + Send + Sync>>,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: a destination is the only handle through which the source reaches the memory, it has no
// tie to a thread, and its writes need `&mut self`.
unsafe impl Send for Destination<'_> {}

impl<'a> Destination<'a> {
    /// Lends `len` bytes at `address`; `owner`, if given, is dropped after the loan ends.
    ///
    /// # Safety
    ///
    /// The bytes must stay mapped writable for `'a`, or where `owner` is given for as long as
    /// `owner` lives. No Rust reference to them may exist during that time. Other processes and
    /// other raw pointers may reach them: a race then spoils bytes, not memory safety.
    pub unsafe fn new(
        address: NonNull<u8>,
        len: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Self {
        Destination { address, len, owner, lifetime: PhantomData }
    }

    /// Length of the loan, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the loan has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `bytes` to `offset` (bytes) of the loan.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the check keeps the write within the loan, which is mapped writable while
        // `self` lives; `bytes` cannot overlap it, as no Rust reference to the loan may exist.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.address.as_ptr().add(offset),
                bytes.len(),
            );
        }
    }

    /// Copies the bytes at `offset` (bytes) of the loan to `bytes`: for a source that looks at what
    /// it has read before it says that it is done.
    ///
    /// # Panics
    ///
    /// If the loan has not so many bytes there.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the check keeps the read within the loan, which is mapped while `self` lives;
        // `bytes` cannot overlap it, as no Rust reference to the loan may exist.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.address.as_ptr().add(offset),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} do not fit into {} bytes",
            self.len
        );
    }

    /// Reads from `file` at `file_offset` (bytes) into the loan from its byte `offset` on, with
    /// one `pread`; returns the bytes read, 0 at the end of the file.
    ///
    /// # Errors
    ///
    /// The system's, `EINTR` excepted.
    ///
    /// # Panics
    ///
    /// If `offset` is past the end of the loan.
    pub fn read_from(&mut self, offset: usize, file: &File, file_offset: u64) -> io::Result<usize> {
        assert!(offset <= self.len, "byte {offset} lies past {} bytes", self.len);
        let file_offset = libc::off64_t::try_from(file_offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        loop {
            // SAFETY: the kernel writes at most `len - offset` bytes from `offset` on, which the
            // assertion keeps within the loan; the loan is mapped writable while `self` lives.
            let read = unsafe {
                libc::pread64(
                    file.as_raw_fd(),
                    self.address.as_ptr().add(offset).cast(),
                    self.len - offset,
                    file_offset,
                )
            };
            if let Ok(read) = usize::try_from(read) {
                return Ok(read);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl<'a> From<&'a mut [u8]> for Destination<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        // SAFETY: the exclusive borrow lasts for `'a`, so the bytes stay mapped and nobody else
        // refers to them. A slice's pointer is never null.
        unsafe { Destination::new(NonNull::from(&mut *bytes).cast(), bytes.len(), None) }
    }
}

/// The bytes behind [`Destination::owned`].
pub struct OwnedBytes(Arc<Mutex<Vec<u8>>>);

impl OwnedBytes {
    /// The bytes, or `None` while a source still holds the destination.
    pub fn take(self) -> Option<Vec<u8>> {
        let bytes = Arc::into_inner(self.0)?;
        Some(bytes.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Destination<'static> {
    /// A destination that owns its memory, and the handle that gives it back once the source has
    /// let go of the destination.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::Destination;
    ///
    /// let (mut destination, bytes) = Destination::owned(vec![0; 4]);
    /// destination.write_at(1, &[7]);
    /// drop(destination);
    /// assert_eq!(bytes.take().unwrap(), [0, 7, 0, 0]);
    /// ```
    pub fn owned(mut bytes: Vec<u8>) -> (Destination<'static>, OwnedBytes) {
        let len = bytes.len();
        let address = NonNull::from(&mut bytes[..]).cast();
        let shared = Arc::new(Mutex::new(bytes));
        // SAFETY: the vector's bytes stay where they are while the `Arc` lives, which the
        // destination keeps; `OwnedBytes` hands the vector out only when it holds the last
        // reference.
        let destination = unsafe { Destination::new(address, len, Some(shared.clone())) };
        (destination, OwnedBytes(shared))
    }
}

impl fmt::Debug for OwnedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedBytes").finish_non_exhaustive()
    }
}

impl fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("address", &self.address)
            .field("len", &self.len)
            .field("owned", &self.owner.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_copy_from_past_the_end_is_refused() {
        Destination::from(&mut [0u8; 8][..]).copy_out(8, &mut [0]);
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_write_past_the_end_is_refused() {
        Destination::from(&mut [0u8; 8][..]).write_at(4, &[0; 5]);
    }
}
