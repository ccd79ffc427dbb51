// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory on loan to a source, which fills it.

use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::SourceError;
use crate::written::Written;

/// Memory on loan to a source, which may only write it.
///
/// Other processes may map the memory as well, so it never becomes a Rust slice: bytes are copied
/// in, or read straight from a file. The destination records which of them were written.
///
/// The loan ends only when the destination is dropped. A source that reports success and keeps the
/// destination delays the pages, so it can never write to pages that are already present.
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
    loan: Loan,
    lifetime: PhantomData<&'a mut [u8]>,
}

/// The owner of lent memory, for loans that are not bound to a lifetime.
pub trait Lender: Send + Sync {
    /// Called when the loan ends, as its last act: nothing is written through it afterwards.
    /// `wrote` is the number of bytes that were written, each counted once.
    fn take_back(&self, wrote: usize);
}

/// The state of a loan, which reports to the lender when it is dropped. It is separate from
/// `Destination`, because a `Drop` implementation on `Destination` would extend the borrow of a
/// lent slice to the end of its scope.
struct Loan {
    written: Written,
    lender: Option<Arc<dyn Lender>>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(lender) = &self.lender {
            lender.take_back(self.written.bytes());
        }
    }
}

// SAFETY: a destination is the only handle through which the source reaches the memory, it is not
// tied to a thread, and its writes need `&mut self`.
unsafe impl Send for Destination<'_> {}

impl<'a> Destination<'a> {
    /// Lends `len` bytes at `address`. `lender`, if given, is notified when the loan ends, and
    /// dropped after that.
    ///
    /// # Safety
    ///
    /// The bytes must stay mapped writable for `'a`, or, if `lender` is given, for as long as
    /// `lender` lives. No Rust reference to them may exist during that time. Other processes and
    /// other raw pointers may access them: a race then corrupts bytes, not memory safety.
    pub unsafe fn new(address: NonNull<u8>, len: usize, lender: Option<Arc<dyn Lender>>) -> Self {
        let loan = Loan { written: Written::default(), lender };
        Destination { address, len, loan, lifetime: PhantomData }
    }

    /// Checks that all bytes have been written, in however many calls.
    ///
    /// # Errors
    ///
    /// [`SourceError::Short`], with the number of bytes that were written.
    pub fn check_filled(&self) -> Result<(), SourceError> {
        check_filled(self.loan.written.bytes(), self.len)
    }

    /// Returns the length of the loan, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the loan has no bytes.
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
        self.loan.written.add(offset, bytes.len());
    }

    /// Copies the bytes at `offset` (bytes) of the loan to `bytes`, for a source that checks its
    /// data before it reports success.
    ///
    /// # Panics
    ///
    /// If the loan has fewer bytes there.
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

    /// Reads from `file` at `file_offset` (bytes) into the loan, from its byte `offset` on, with
    /// one `pread`. Returns the number of bytes read, which is 0 at the end of the file.
    ///
    /// # Errors
    ///
    /// The system's error, except `EINTR`, after which the call is repeated.
    ///
    /// # Panics
    ///
    /// If `offset` is past the end of the loan.
    pub fn read_from(&mut self, offset: usize, file: &File, file_offset: u64) -> io::Result<usize> {
        self.pread(offset, file, file_offset, 0)
    }

    /// Like [`read_from`](Self::read_from), but reads only from the page cache.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the first byte is not cached, and `EOPNOTSUPP` if the file system does not
    /// support the flag.
    pub(crate) fn read_cached(
        &mut self,
        offset: usize,
        file: &File,
        file_offset: u64,
    ) -> io::Result<usize> {
        self.pread(offset, file, file_offset, libc::RWF_NOWAIT)
    }

    fn pread(
        &mut self,
        offset: usize,
        file: &File,
        file_offset: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        assert!(offset <= self.len, "byte {offset} lies past the end of {} bytes", self.len);
        let file_offset = libc::off64_t::try_from(file_offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        loop {
            // SAFETY: the assertion keeps the address within the loan, or one past its last byte.
            let iov_base = unsafe { self.address.as_ptr().add(offset) }.cast();
            let iov = libc::iovec { iov_base, iov_len: self.len - offset };
            // SAFETY: the kernel writes at most `len - offset` bytes from `offset` on, which lie
            // in the loan; the loan is mapped writable while `self` lives.
            let read = unsafe { libc::preadv64v2(file.as_raw_fd(), &iov, 1, file_offset, flags) };
            if let Ok(read) = usize::try_from(read) {
                self.loan.written.add(offset, read);
                return Ok(read);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Fills the `len` bytes at `offset` of the loan through `fill`.
    ///
    /// # Errors
    ///
    /// The errors of `fill`, and [`SourceError::Short`] if it does not write all bytes.
    ///
    /// # Panics
    ///
    /// If the loan has fewer bytes there.
    pub(crate) fn fill_part(
        &mut self,
        offset: usize,
        len: usize,
        fill: impl FnOnce(&mut Destination<'_>) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        self.check(offset, len);
        // SAFETY: the check keeps the bytes within this loan, which is borrowed exclusively while
        // the part lives; the conditions that hold for the loan hold for each part of it.
        let mut part = unsafe { Destination::new(self.address.add(offset), len, None) };
        fill(&mut part)?;
        part.check_filled()?;
        self.loan.written.add(offset, len);
        Ok(())
    }

    /// Fills the loan with zeros.
    pub(crate) fn fill_zeros(&mut self) {
        // SAFETY: the loan is mapped writable while `self` lives, and no Rust reference to it
        // exists.
        unsafe { self.address.as_ptr().write_bytes(0, self.len) };
        self.loan.written.add(0, self.len);
    }
}

impl<'a> From<&'a mut [u8]> for Destination<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        // SAFETY: the exclusive borrow lasts for `'a`, so the bytes stay mapped, and no other
        // reference to them exists.
        unsafe { Destination::new(NonNull::from(&mut *bytes).cast(), bytes.len(), None) }
    }
}

/// Checks that the number of bytes written equals the number of bytes lent.
///
/// # Errors
///
/// [`SourceError::Short`] if it does not.
pub(crate) fn check_filled(wrote: usize, len: usize) -> Result<(), SourceError> {
    let (wrote, len) = (wrote as u64, len as u64);
    if wrote == len { Ok(()) } else { Err(SourceError::Short { wrote, len }) }
}

/// The handle to the bytes behind a [`Destination::owned`].
pub struct OwnedBytes(Arc<Owned>);

struct Owned {
    bytes: Mutex<Vec<u8>>,
    wrote: AtomicUsize,
}

impl Lender for Owned {
    fn take_back(&self, wrote: usize) {
        self.wrote.store(wrote, Ordering::Release);
    }
}

impl OwnedBytes {
    /// Returns the bytes, if the source has written all of them.
    ///
    /// # Errors
    ///
    /// [`SourceError::Abandoned`] if the destination has not been dropped yet, and
    /// [`SourceError::Short`] if bytes were not written.
    pub fn take(self) -> Result<Vec<u8>, SourceError> {
        let Owned { bytes, wrote } = Arc::into_inner(self.0).ok_or(SourceError::Abandoned)?;
        let bytes = bytes.into_inner().unwrap_or_else(PoisonError::into_inner);
        check_filled(wrote.into_inner(), bytes.len())?;
        Ok(bytes)
    }
}

impl Destination<'static> {
    /// Returns a destination that owns its memory, and the handle that returns the bytes once the
    /// destination is dropped.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::Destination;
    ///
    /// let (mut destination, bytes) = Destination::owned(vec![0; 4]);
    /// destination.write_at(2, &[7, 8]);
    /// destination.write_at(0, &[5, 6]);
    /// drop(destination);
    /// assert_eq!(bytes.take().unwrap(), [5, 6, 7, 8]);
    /// ```
    pub fn owned(mut bytes: Vec<u8>) -> (Destination<'static>, OwnedBytes) {
        let len = bytes.len();
        let address = NonNull::from(&mut bytes[..]).cast();
        let shared = Arc::new(Owned { bytes: Mutex::new(bytes), wrote: AtomicUsize::new(0) });
        // SAFETY: the vector's bytes do not move while the `Arc` lives, and the destination holds a
        // reference to it. `OwnedBytes` returns the vector only if it holds the last reference.
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
            .field("written", &self.loan.written.bytes())
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
    fn unwritten_bytes_are_reported() {
        let mut bytes = [0; 8];
        let mut destination = Destination::from(&mut bytes[..]);
        // Writing the same half twice does not fill it.
        destination.write_at(4, &[1; 4]);
        destination.write_at(4, &[2; 4]);
        let error = destination.check_filled().unwrap_err();
        assert!(matches!(error, SourceError::Short { wrote: 4, len: 8 }), "{error}");
        destination.write_at(0, &[3; 4]);
        destination.check_filled().unwrap();
        assert_eq!(bytes, [3, 3, 3, 3, 2, 2, 2, 2]);

        let (mut destination, bytes) = Destination::owned(vec![0; 8]);
        destination.write_at(0, &[1]);
        drop(destination);
        assert!(matches!(bytes.take(), Err(SourceError::Short { wrote: 1, len: 8 })));
        let (_destination, bytes) = Destination::owned(vec![0; 8]);
        assert!(matches!(bytes.take(), Err(SourceError::Abandoned)));
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_write_past_the_end_is_refused() {
        Destination::from(&mut [0u8; 8][..]).write_at(4, &[0; 5]);
    }
}
