// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares every byte of the guest's memory and of its disk with its expected value after a plan.
//!
//! The verifier uses only the plan's parameters and the pristine disk, so it can run in a separate
//! process that took no part in the run. Memory must be complete: missing pages read as zeros here,
//! and are reported.

mod disk;
mod memory;
mod outside;
mod rings;
#[cfg(test)]
mod tests;

pub use self::memory::{FinalMemory, Part};

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use demand_memory::to_usize;
use serde::Serialize;

use crate::content::{PAGE_BYTES, UNIT_BYTES, UNIT_PAGES};
use crate::plan::{Plan, Role, Width};
use crate::rings::Direction;

const PAGE: u64 = PAGE_BYTES as u64;

/// Maximum number of differences kept; further ones are only counted.
pub const KEPT_DIFFERENCES: usize = 10;

/// The location of a difference.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In guest memory; the offset is the guest physical address.
    Memory,
    /// In a device's ring; the offset is the guest physical address.
    Ring,
    /// On the disk; the offset is in bytes.
    Disk,
}

/// A difference: the first in a page of memory or in a block of 4096 bytes of the disk.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Difference {
    /// Its location.
    pub place: Place,
    /// Its offset there, in bytes.
    pub offset: u64,
    /// The expected value: the aligned word that contains the offset, or a number in a ring.
    pub expected: u64,
    /// The value found.
    pub found: u64,
    /// Number of bytes that differ in this page or block.
    pub bytes: u64,
    /// The use of the page or block.
    pub role: String,
    /// The likely cause, if obvious.
    pub note: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Memory => "memory at",
            Place::Ring => "ring at",
            Place::Disk => "disk at byte",
        };
        let Difference { offset, expected, found, bytes, role, note, .. } = self;
        write!(f, "{place} {offset:#x} ({role}): expected {expected:#018x}, found {found:#018x}")?;
        write!(f, ", {bytes} bytes differ")?;
        if note.is_empty() { Ok(()) } else { write!(f, "; {note}") }
    }
}

/// The result of a comparison.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    /// Whether every byte has the expected value.
    pub equal: bool,
    /// The first differences, at most [`KEPT_DIFFERENCES`].
    pub differences: Vec<Difference>,
    /// Total number of differences: pages, blocks of the disk, entries of rings.
    pub difference_count: u64,
    /// Number of bytes of memory under test compared.
    pub memory_bytes: u64,
    /// Number of bytes of disk compared.
    pub disk_bytes: u64,
}

impl Verdict {
    pub(crate) fn add(&mut self, difference: Difference) {
        self.difference_count += 1;
        if self.differences.len() < KEPT_DIFFERENCES {
            self.differences.push(difference);
        }
    }
}

/// Errors that prevent a verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A read failed.
    #[error(
        "cannot read {len} bytes at offset {offset} of the {what}: {source}; give the complete one"
    )]
    Read {
        /// The file that was read.
        what: &'static str,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is too short.
    #[error(
        "cannot verify the {what}: it has {found} bytes, and the plan needs {needed}; give the one \
         that was used"
    )]
    Short {
        /// The file.
        what: &'static str,
        /// Its size in bytes.
        found: u64,
        /// The minimum size in bytes.
        needed: u64,
    },
    /// The plan has a disk, and one of its files is missing.
    #[error(
        "cannot verify a plan with a disk: the disk or its pristine image is missing; give both"
    )]
    NoDisk,
}

/// The disk before and after.
#[derive(Clone, Copy, Debug)]
pub struct Disks<'a> {
    /// Before anything ran.
    pub pristine: &'a File,
    /// After the run.
    pub disk: &'a File,
}

/// Compares every byte of memory, and of the disk if any, with its expected value after `plan`;
/// memory that is not under test must be zero. With `untouched` that memory must not even be
/// allocated, because no thread has ever requested it.
///
/// # Errors
/// If a read fails. A difference is not an error but part of the verdict.
pub fn verify(
    plan: &Plan,
    memory: &FinalMemory<'_>,
    disks: Option<Disks<'_>>,
    untouched: bool,
) -> Result<Verdict, VerifyError> {
    if plan.rings().is_some() && disks.is_none() {
        return Err(VerifyError::NoDisk);
    }
    memory.check_length(plan.windows().vm_bytes())?;
    let mut verdict = Verdict::default();
    let mut pieces = pieces_of(plan);
    rings::check(plan, memory, &mut pieces, &mut verdict)?;
    pieces.sort_unstable_by_key(|piece| piece.address);
    let pristine = disks.map(|disks| disks.pristine);
    compare_memory(plan, memory, &pieces, pristine, &mut verdict)?;
    outside::check(plan, memory, untouched, &mut verdict)?;
    if let Some(disks) = disks {
        disk::compare(plan, disks, &mut verdict)?;
    }
    verdict.equal = verdict.difference_count == 0;
    Ok(verdict)
}

/// A piece of memory, within a page, that differs from the image.
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) bytes: Bytes,
}

pub(crate) enum Bytes {
    Value(u64, Width),
    Disk { offset: u64, len: usize },
    Known(Vec<u8>),
}

/// Returns the pieces of memory that stores and the back-end have changed.
fn pieces_of(plan: &Plan) -> Vec<Piece> {
    let stores = plan.stores().iter();
    let mut pieces: Vec<Piece> = stores
        .map(|store| Piece {
            address: store.address,
            bytes: Bytes::Value(store.value, store.width),
        })
        .collect();
    let reads = plan.requests().iter().filter(|r| r.direction == Direction::Read);
    for (segment, offset) in reads.flat_map(|request| request.pieces()) {
        for (at, len) in by_page(segment.address, segment.len as usize) {
            let offset = offset + at as u64;
            let address = segment.address + at as u64;
            pieces.push(Piece { address, bytes: Bytes::Disk { offset, len } });
        }
    }
    if let Some(rings) = plan.rings() {
        for (address, bytes) in rings.final_bytes() {
            push_known(&mut pieces, address, &bytes);
        }
    }
    pieces
}

/// Adds bytes with a known value.
pub(crate) fn push_known(pieces: &mut Vec<Piece>, address: u64, bytes: &[u8]) {
    for (at, len) in by_page(address, bytes.len()) {
        let known = Bytes::Known(bytes[at..at + len].to_vec());
        pieces.push(Piece { address: address + at as u64, bytes: known });
    }
}

/// Splits `len` bytes at `address` at page boundaries: pairs of offset and length.
pub(crate) fn by_page(address: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left_in_page = PAGE_BYTES - ((address + at as u64) % PAGE) as usize;
        let now = left_in_page.min(len - at);
        at += now;
        (now > 0).then_some((at - now, now))
    })
}

fn compare_memory(
    plan: &Plan,
    memory: &FinalMemory<'_>,
    pieces: &[Piece],
    pristine: Option<&File>,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let content = plan.content();
    let mut buffer = Vec::new();
    let mut expected = Box::new([0; PAGE_BYTES]);
    let mut pieces = pieces.iter().peekable();
    let windows = plan.windows();
    for unit in 0..plan.params().units() {
        let bytes = memory.unit(windows.packed(unit * UNIT_BYTES), &mut buffer)?;
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        for (page, found) in (unit * UNIT_PAGES..).zip(pages) {
            let end = (page + 1) * PAGE;
            if pieces.peek().is_none_or(|piece| piece.address >= end) {
                if content.page_is(page, found) {
                    continue;
                }
                content.page(page, &mut expected);
            } else {
                content.page(page, &mut expected);
                while let Some(piece) = pieces.next_if(|piece| piece.address < end) {
                    apply(piece, &mut expected, pristine)?;
                }
            }
            if *expected == *found {
                continue;
            }
            let note = if found.iter().all(|&byte| byte == 0) {
                "the page is all zeros, as if it had never arrived"
            } else if content.page_is(page, found) {
                "the page is the image's, as if it had arrived again or never been written"
            } else {
                ""
            };
            let role = plan.roles()[to_usize(page)];
            let (place, role) = (Place::Memory, describe(role));
            let start = windows.guest_address(page * PAGE);
            verdict.add(difference(place, start, &expected[..], found, role, note));
        }
    }
    verdict.memory_bytes = plan.params().memory_bytes;
    Ok(())
}

/// Copies a piece into its page.
fn apply(
    piece: &Piece,
    page: &mut [u8; PAGE_BYTES],
    pristine: Option<&File>,
) -> Result<(), VerifyError> {
    let place = &mut page[(piece.address % PAGE) as usize..];
    match &piece.bytes {
        Bytes::Value(value, width) => {
            let len = to_usize(width.bytes());
            place[..len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        &Bytes::Disk { offset, len } => {
            let what = "pristine disk image";
            pristine
                .ok_or(VerifyError::NoDisk)?
                .read_exact_at(&mut place[..len], offset)
                .map_err(|source| VerifyError::Read { what, offset, len: len as u64, source })?;
        }
        Bytes::Known(bytes) => place[..bytes.len()].copy_from_slice(bytes),
    }
    Ok(())
}

/// Describes the difference between two unequal pages or blocks of the same length, which begin at
/// `start`.
pub(crate) fn difference(
    place: Place,
    start: u64,
    expected: &[u8],
    found: &[u8],
    role: String,
    note: &str,
) -> Difference {
    let differ = |i: &usize| expected[*i] != found[*i];
    let first = (0..expected.len()).find(differ).unwrap_or(0);
    let word = |bytes: &[u8]| {
        let from = first - first % 8;
        let mut word = [0; 8];
        let some = &bytes[from..bytes.len().min(from + 8)];
        word[..some.len()].copy_from_slice(some);
        u64::from_le_bytes(word)
    };
    Difference {
        place,
        offset: start + first as u64,
        expected: word(expected),
        found: word(found),
        bytes: (0..expected.len()).filter(differ).count() as u64,
        role,
        note: note.to_owned(),
    }
}

pub(crate) fn describe(role: Role) -> String {
    match role {
        Role::Untouched => "untouched".to_owned(),
        Role::Rings => "rings, headers and status bytes".to_owned(),
        Role::GuestCheck(cpu) => format!("read by vCPU {cpu}"),
        Role::GuestCheckShared(one, other) => format!("read by vCPUs {one} and {other}"),
        Role::GuestWrite(cpu) => format!("written by vCPU {cpu}"),
        Role::GuestCall(cpu) => format!("code that vCPU {cpu} runs"),
        Role::DiskRead(_) => "read from the disk by the back-end".to_owned(),
        Role::DiskWrite => "written to the disk by the back-end".to_owned(),
        Role::VmmCheck => "read by the VMM".to_owned(),
        Role::VmmWrite(_) => "written by the VMM".to_owned(),
    }
}
