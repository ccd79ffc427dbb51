// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks the part of the VM's memory that is not under test.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use demand_memory::to_usize;

use crate::content::PAGE_BYTES;
use crate::plan::Plan;
use crate::verify::{Difference, FinalMemory, Part, Place, Verdict, VerifyError, difference};
use crate::windows::{Windows, guest_address};

const PAGE: u64 = PAGE_BYTES as u64;
const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
const ROLE: &str = "outside of the memory under test";

/// Checks that it is zero, and with `untouched` that it is not allocated.
pub(crate) fn check(
    plan: &Plan,
    memory: &FinalMemory<'_>,
    untouched: bool,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let windows = plan.windows();
    match memory {
        FinalMemory::Bytes(bytes) => {
            for (from, to) in windows.gaps() {
                check_zero(from, &bytes[to_usize(from)..to_usize(to)], verdict);
            }
            Ok(())
        }
        FinalMemory::Files(parts) => {
            parts.iter().try_for_each(|part| check_part(windows, part, untouched, verdict))
        }
    }
}

fn check_part(
    windows: &Windows,
    part: &Part<'_>,
    untouched: bool,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let end = part.start + part.len;
    let failed = |source| {
        let (what, offset, len) = ("allocation of guest memory", part.start, part.len);
        VerifyError::Read { what, offset, len, source }
    };
    let metadata = part.file.metadata().map_err(failed)?;
    // For huge pages the kernel reports only the amount of allocated memory, in blocks of their
    // size, not its place.
    let block = metadata.blksize().max(PAGE);
    let allocated = metadata.blocks() * 512;
    let expected = bytes_of_windows(windows, part, block);
    if untouched && allocated > expected {
        let note = "bytes are allocated that no access has requested".to_owned();
        let (place, offset, bytes) =
            (Place::Memory, guest_address(part.start), allocated - expected);
        let role = ROLE.to_owned();
        verdict.add(Difference { place, offset, expected, found: allocated, bytes, role, note });
    }
    if is_hugetlb(part)? && allocated <= expected {
        return Ok(());
    }
    let mut buffer = vec![0; 1 << 20];
    for (from, to) in windows.gaps() {
        let (mut at, to) = (from.max(part.start), to.min(end));
        while at < to {
            let Some(data) = seek(part, at, libc::SEEK_DATA)? else { break };
            let hole = seek(part, data, libc::SEEK_HOLE)?.unwrap_or(end);
            at = data;
            while at < to.min(hole) {
                let len = to_usize((to.min(hole) - at).min(buffer.len() as u64));
                part.read(at, &mut buffer[..len])?;
                check_zero(at, &buffer[..len], verdict);
                at += len as u64;
            }
        }
    }
    Ok(())
}

/// Returns the size in bytes of the file's blocks that contain memory under test.
fn bytes_of_windows(windows: &Windows, part: &Part<'_>, block: u64) -> u64 {
    let mut last = None;
    let mut blocks = 0;
    for window in windows.list() {
        let from = window.packed.max(part.start);
        let to = (window.packed + window.bytes).min(part.start + part.len);
        if from < to {
            let (mut first, end) = ((from - part.start) / block, (to - part.start).div_ceil(block));
            first += u64::from(last == Some(first));
            blocks += end - first;
            last = Some(end - 1);
        }
    }
    blocks * block
}

fn check_zero(packed: u64, bytes: &[u8], verdict: &mut Verdict) {
    for (page, found) in (packed..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES)) {
        if found.iter().any(|&byte| byte != 0) {
            let (start, expected) = (guest_address(page), &ZEROS[..found.len()]);
            let note = "it must be zero";
            verdict.add(difference(Place::Memory, start, expected, found, ROLE.to_owned(), note));
        }
    }
}

/// Returns the place of the next byte of a kind at or after `packed`; `None` if there is none.
fn seek(part: &Part<'_>, packed: u64, whence: libc::c_int) -> Result<Option<u64>, VerifyError> {
    let offset = packed - part.start;
    // SAFETY: lseek accesses no memory; no other code uses the file's position.
    let found = unsafe { libc::lseek64(part.file.as_raw_fd(), offset as i64, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(part.start + found));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        source => Err(VerifyError::Read { what: "holes of guest memory", offset, len: 0, source }),
    }
}

fn is_hugetlb(part: &Part<'_>) -> Result<bool, VerifyError> {
    // SAFETY: all zeros is a valid value of this structure of numbers.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure, which is ours.
    if unsafe { libc::fstatfs(part.file.as_raw_fd(), &mut stat) } < 0 {
        let (offset, len, source) = (part.start, part.len, io::Error::last_os_error());
        return Err(VerifyError::Read { what: "file system of guest memory", offset, len, source });
    }
    Ok(stat.f_type == libc::HUGETLBFS_MAGIC)
}
