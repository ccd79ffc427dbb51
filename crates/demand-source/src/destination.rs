// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory on loan to a source, which fills it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::SourceError;
use crate::written::Written;

/// Bytes that [`Destination::read_exact_from`] reads at once.
const BOUNCE: usize = 16 << 10;

/// Memory on loan to a source, which may only write it.
///
/// Other processes may map the memory as well, so it never becomes a Rust slice: bytes are copied
/// in ([`write_at`](Self::write_at)), read from any [`Read`]
/// ([`read_exact_from`](Self::read_exact_from)), read straight from a file
/// ([`read_from`](Self::read_from)), or written by the kernel
/// ([`as_iovec`](Self::as_iovec)). The destination records which of them were written: a request
/// that left some unwritten has failed, whatever its source reports.
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

    /// Returns whether the bytes are still wanted. Once it has returned `false`, a source need not
    /// read them: see [`Destination::is_wanted`]. The default is `true`.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// The state of a loan, which reports to the lender when it is dropped. It is separate from
/// `Destination`, because a `Drop` implementation on `Destination` would extend the borrow of a
/// lent slice to the end of its scope.
struct Loan {
    written: Written,
    /// Bytes at the end that are written and no longer part of the destination.
    tail: usize,
    lender: Option<Arc<dyn Lender>>,
}

/// The lender of a loan that was split: it gets its memory back when the last part is returned.
struct Joined {
    lender: Arc<dyn Lender>,
    wrote: AtomicUsize,
}

impl Lender for Joined {
    fn take_back(&self, wrote: usize) {
        self.wrote.fetch_add(wrote, Ordering::AcqRel);
    }

    fn is_wanted(&self) -> bool {
        self.lender.is_wanted()
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.lender.take_back(*self.wrote.get_mut());
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(lender) = &self.lender {
            lender.take_back(self.written.bytes() + self.tail);
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
        let loan = Loan { written: Written::default(), tail: 0, lender };
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

    /// Returns whether the bytes are still wanted. They are not once the memory that they belong to
    /// has stopped: a source with a queue may then drop the request unanswered.
    pub fn is_wanted(&self) -> bool {
        self.loan.lender.as_ref().is_none_or(|lender| lender.is_wanted())
    }

    /// Splits the loan at byte `at`: it keeps the bytes before, and the returned destination has
    /// those from there on. A source does so before it writes, to read the parts of a large request
    /// at the same time. The lender gets its memory back when all parts are dropped.
    ///
    /// # Panics
    ///
    /// If `at` is past the end of the loan, or part of the loan is already written.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::Destination;
    ///
    /// let (mut first, bytes) = Destination::owned(vec![0; 8]);
    /// let mut second = first.split_off(6);
    /// let reader = std::thread::spawn(move || second.write_at(0, &[2; 2]));
    /// first.write_at(0, &[1; 6]);
    /// drop(first);
    /// reader.join().unwrap();
    /// assert_eq!(bytes.take().unwrap(), [1, 1, 1, 1, 1, 1, 2, 2]);
    /// ```
    #[must_use = "the bytes from there on are in the returned destination only"]
    pub fn split_off(&mut self, at: usize) -> Destination<'a> {
        self.check(at, 0);
        assert_eq!(self.loan.written.bytes(), 0, "a loan is split before it is written");
        let wrote = AtomicUsize::new(std::mem::take(&mut self.loan.tail));
        let lender = self.loan.lender.take();
        let joined = lender.map(|lender| -> Arc<dyn Lender> { Arc::new(Joined { lender, wrote }) });
        self.loan.lender.clone_from(&joined);
        // SAFETY: the check keeps the bytes within this loan, which loses them in the next line, so
        // no two destinations have them; the lender lives until both parts are dropped.
        let rest = unsafe { Destination::new(self.address.add(at), self.len - at, joined) };
        self.len = at;
        rest
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
        self.pread(offset, file, file_offset, |fd, address, len, at| {
            // SAFETY: `pread` calls this with a part of the loan, which is mapped writable; the
            // kernel writes at most `len` bytes there.
            unsafe { libc::pread64(fd, address, len, at) }
        })
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
        self.pread(offset, file, file_offset, |fd, address, len, at| {
            let iov = libc::iovec { iov_base: address, iov_len: len };
            // SAFETY: as in `read_from`; the vector lives through the call.
            unsafe { libc::preadv64v2(fd, &iov, 1, at, libc::RWF_NOWAIT) }
        })
    }

    /// Reads by the system call `call`: from a file, to an address, at most so many bytes, from an
    /// offset in the file.
    #[inline]
    fn pread(
        &mut self,
        offset: usize,
        file: &File,
        file_offset: u64,
        call: impl Fn(RawFd, *mut libc::c_void, usize, libc::off64_t) -> libc::ssize_t,
    ) -> io::Result<usize> {
        assert!(offset <= self.len, "byte {offset} lies past the end of {} bytes", self.len);
        let file_offset = libc::off64_t::try_from(file_offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let iov = self.as_iovec(offset, self.len - offset);
        loop {
            let read = call(file.as_raw_fd(), iov.iov_base, iov.iov_len, file_offset);
            if let Ok(read) = usize::try_from(read) {
                self.mark_written(offset, read);
                return Ok(read);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Reads exactly `len` bytes from `reader` to `offset` (bytes) of the loan, in pieces, through a
    /// small buffer.
    ///
    /// # Errors
    ///
    /// The reader's error, except `Interrupted`, after which it is asked again;
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if it ends before `len` bytes. The bytes
    /// before the error are written.
    ///
    /// # Panics
    ///
    /// If the bytes do not fit.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::Destination;
    ///
    /// let mut answer = &b"header, content"[..];
    /// let (mut destination, bytes) = Destination::owned(vec![0; 7]);
    /// std::io::copy(&mut std::io::Read::take(&mut answer, 8), &mut std::io::sink()).unwrap();
    /// destination.read_exact_from(0, 7, &mut answer).unwrap();
    /// drop(destination);
    /// assert_eq!(bytes.take().unwrap(), b"content");
    /// ```
    pub fn read_exact_from(
        &mut self,
        offset: usize,
        len: usize,
        reader: &mut (impl Read + ?Sized),
    ) -> io::Result<()> {
        self.check(offset, len);
        let mut bounce = [0; BOUNCE];
        let mut done = 0;
        while done < len {
            let most = BOUNCE.min(len - done);
            match reader.read(&mut bounce[..most]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    let bytes = bounce.get(..read.min(most)).unwrap_or_default();
                    self.write_at(offset + done, bytes);
                    done += bytes.len();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns `len` bytes at `offset` of the loan as the kernel takes them, for `readv`, `recvmsg`
    /// or an `io_uring`. Bytes that the kernel has written must be reported by
    /// [`mark_written`](Self::mark_written).
    ///
    /// The address is valid for writes by the kernel until the destination is dropped, wherever the
    /// destination is moved meanwhile. A caller that lets the kernel write later, as with an
    /// `io_uring`, must keep the destination until the kernel is done: the pages may be present
    /// after that, and written by the guest. No Rust reference to the bytes may be made.
    ///
    /// # Panics
    ///
    /// If the loan has fewer bytes there.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::Destination;
    /// use std::os::fd::AsRawFd;
    ///
    /// let (receiver, mut sender) = std::os::unix::net::UnixStream::pair().unwrap();
    /// std::io::Write::write_all(&mut sender, &[7; 8192]).unwrap();
    /// let (mut first, bytes) = Destination::owned(vec![0; 4096]);
    /// let (mut second, _) = Destination::owned(vec![0; 4096]);
    ///
    /// // One system call fills two destinations.
    /// let iovecs = [first.as_iovec(0, 4096), second.as_iovec(0, 4096)];
    /// // SAFETY: the kernel writes only the loans, which both live through the call.
    /// let read = unsafe { libc::readv(receiver.as_raw_fd(), iovecs.as_ptr(), 2) };
    /// let read = usize::try_from(read).unwrap();
    /// first.mark_written(0, read.min(4096));
    /// second.mark_written(0, read.saturating_sub(4096));
    ///
    /// first.check_filled().unwrap();
    /// drop(first);
    /// assert_eq!(bytes.take().unwrap(), [7; 4096]);
    /// ```
    pub fn as_iovec(&mut self, offset: usize, len: usize) -> libc::iovec {
        self.check(offset, len);
        // SAFETY: the check keeps the address within the loan, or one past its last byte.
        let iov_base = unsafe { self.address.as_ptr().add(offset) }.cast();
        libc::iovec { iov_base, iov_len: len }
    }

    /// Records that the kernel has written the `len` bytes at `offset` of the loan, through an
    /// [iovec](Self::as_iovec). Bytes that are recorded and were not written show the guest what was
    /// in memory before, so `len` must be the number that the kernel returned.
    ///
    /// # Panics
    ///
    /// If the loan has fewer bytes there.
    pub fn mark_written(&mut self, offset: usize, len: usize) {
        self.check(offset, len);
        self.loan.written.add(offset, len);
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
    pub fn fill_zeros(&mut self) {
        self.write_zeros(0);
        self.loan.written.add(0, self.len);
    }

    /// Fills all bytes from `start` on with zeros, and shortens the destination to the bytes before
    /// them. The lender still gets all bytes back.
    pub(crate) fn cut_zeros(&mut self, start: usize) {
        if start < self.len {
            self.write_zeros(start);
            self.loan.tail += self.len - start;
            self.len = start;
        }
    }

    fn write_zeros(&mut self, start: usize) {
        self.check(start, 0);
        // SAFETY: the check keeps the write within the loan, which is mapped writable while `self`
        // lives, and no Rust reference to it exists.
        unsafe { self.address.as_ptr().add(start).write_bytes(0, self.len - start) };
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

    #[test]
    #[should_panic(expected = "do not fit")]
    fn iovec_past_the_end_is_refused() {
        let _ = Destination::from(&mut [0u8; 8][..]).as_iovec(4, 5);
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn mark_past_the_end_is_refused() {
        Destination::from(&mut [0u8; 8][..]).mark_written(4, 5);
    }

    /// A reader of these bytes, three at a time and with interruptions, which then fails.
    struct Trickle {
        left: Vec<u8>,
        calls: usize,
        claims: usize,
    }

    impl Read for Trickle {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.calls += 1;
            if self.calls.is_multiple_of(2) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if self.left.is_empty() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let count = buffer.len().min(self.left.len()).min(3);
            self.left.drain(..count).zip(&mut *buffer).for_each(|(byte, to)| *to = byte);
            Ok(count + self.claims)
        }
    }

    #[test]
    fn bytes_of_a_reader_are_counted() {
        let all: Vec<u8> = (1..=50).collect();
        let mut reader = Trickle { left: all.clone(), calls: 0, claims: 0 };
        let mut bytes = [0; 60];
        let mut destination = Destination::from(&mut bytes[..]);
        destination.read_exact_from(2, 40, &mut reader).unwrap();
        assert_eq!(destination.loan.written.bytes(), 40);
        assert_eq!(reader.left, all[40..], "no byte of the next answer is taken");
        // The reader fails, or ends, in the middle.
        let error = destination.read_exact_from(42, 18, &mut reader).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(destination.loan.written.bytes(), 50);
        let error = destination.read_exact_from(42, 2, &mut &all[..1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        destination.check_filled().unwrap_err();
        // A reader that reports more than it was asked for reaches no other memory.
        let mut liar = Trickle { left: all.clone(), calls: 0, claims: 1 << 20 };
        destination.read_exact_from(0, 2, &mut liar).unwrap();
        assert_eq!(bytes[..2], all[..2]);
        assert_eq!(bytes[2..42], all[..40]);
    }

    #[test]
    fn read_longer_than_the_buffer_arrives() {
        let all: Vec<u8> = (0..=250).cycle().take(3 * BOUNCE + 7).collect();
        let (mut destination, bytes) = Destination::owned(vec![0; all.len()]);
        destination.read_exact_from(0, all.len(), &mut &all[..]).unwrap();
        drop(destination);
        assert!(bytes.take().unwrap() == all);
    }

    #[test]
    fn bytes_of_an_iovec_count_once_marked() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 6], 0).unwrap();
        let (mut destination, bytes) = Destination::owned(vec![0; 8]);
        let iovec = destination.as_iovec(1, 7);
        // SAFETY: the kernel writes only the loan, which lives through the call.
        let read = unsafe { libc::preadv64(file.as_raw_fd(), &iovec, 1, 0) };
        assert_eq!(read, 6);
        destination.check_filled().unwrap_err();
        destination.mark_written(1, 6);
        assert_eq!(destination.loan.written.bytes(), 6);
        drop(destination);
        assert!(matches!(bytes.take(), Err(SourceError::Short { wrote: 6, len: 8 })));
    }

    #[test]
    fn parts_of_a_loan_count_together() {
        let (mut first, bytes) = Destination::owned(vec![9; 10]);
        first.cut_zeros(9);
        let mut second = first.split_off(4);
        let mut third = second.split_off(2);
        assert_eq!([first.len(), second.len(), third.len()], [4, 2, 3]);
        third.write_at(0, &[3; 3]);
        first.write_at(0, &[1; 4]);
        drop((third, first));
        second.write_at(0, &[2; 2]);
        second.check_filled().unwrap();
        drop(second);
        assert_eq!(bytes.take().unwrap(), [1, 1, 1, 1, 2, 2, 3, 3, 3, 0]);
        // A part that is missing, and one that has not come back.
        let (mut first, bytes) = Destination::owned(vec![9; 8]);
        let second = first.split_off(4);
        first.write_at(0, &[1; 4]);
        drop((first, second));
        assert!(matches!(bytes.take(), Err(SourceError::Short { wrote: 4, len: 8 })));
        let (mut first, bytes) = Destination::owned(vec![9; 8]);
        let _second = first.split_off(4);
        drop(first);
        assert!(matches!(bytes.take(), Err(SourceError::Abandoned)));
    }

    #[test]
    #[should_panic(expected = "before it is written")]
    fn written_loan_is_not_split() {
        let mut bytes = [0; 8];
        let mut destination = Destination::from(&mut bytes[..]);
        destination.write_at(0, &[1]);
        let _ = destination.split_off(4);
    }

    #[test]
    fn cut_zeros_count_as_written() {
        let (mut destination, bytes) = Destination::owned(vec![1; 8]);
        destination.cut_zeros(5);
        destination.cut_zeros(6);
        assert_eq!(destination.len(), 5);
        destination.check_filled().unwrap_err();
        destination.write_at(0, &[2; 5]);
        destination.check_filled().unwrap();
        drop(destination);
        assert_eq!(bytes.take().unwrap(), [2, 2, 2, 2, 2, 0, 0, 0]);
    }
}
