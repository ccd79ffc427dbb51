// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares the disk with its pristine image and the back-end's writes.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use demand_memory::to_usize;

use crate::content::PAGE_BYTES;
use crate::plan::Plan;
use crate::rings::{Direction, Request};
use crate::verify::{Difference, Disks, Place, Verdict, VerifyError, by_page, difference};

const CHUNK: u64 = 1 << 20;

/// A piece of memory that was written to the disk.
struct Written<'a> {
    offset: u64,
    address: u64,
    len: usize,
    request: &'a Request,
}

pub(crate) fn compare(
    plan: &Plan,
    disks: Disks<'_>,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let needed = plan.params().disk.as_ref().map_or(0, |disk| disk.disk_sectors * 512);
    let pristine_len = length(disks.pristine, "pristine disk image")?;
    let disk_len = length(disks.disk, "disk")?;
    if pristine_len < needed {
        let (what, found) = ("pristine disk image", pristine_len);
        return Err(VerifyError::Short { what, found, needed });
    }
    if disk_len != pristine_len {
        verdict.add(Difference {
            place: Place::Disk,
            offset: disk_len.min(pristine_len),
            expected: pristine_len,
            found: disk_len,
            bytes: disk_len.abs_diff(pristine_len),
            role: "the length of the disk".to_owned(),
            note: String::new(),
        });
    }
    let written = written(plan);
    let mut next = written.iter().peekable();
    let (mut expected, mut found) = (vec![0; to_usize(CHUNK)], vec![0; to_usize(CHUNK)]);
    let end = pristine_len.min(disk_len);
    for start in (0..end).step_by(to_usize(CHUNK)) {
        let len = to_usize(CHUNK.min(end - start));
        let (expected, found) = (&mut expected[..len], &mut found[..len]);
        read(disks.pristine, "pristine disk image", start, expected)?;
        read(disks.disk, "disk", start, found)?;
        let first = next.clone();
        // Pieces lie within a block, hence within a chunk.
        while let Some(piece) = next.next_if(|piece| piece.offset < start + len as u64) {
            let mut page = [0; PAGE_BYTES];
            plan.content().page(piece.address / PAGE_BYTES as u64, &mut page);
            let from = to_usize(piece.address) % PAGE_BYTES;
            let to = to_usize(piece.offset - start);
            let bytes = &page[from..from + piece.len];
            expected[to..to + piece.len].copy_from_slice(bytes);
        }
        if expected == found {
            continue;
        }
        let blocks = expected.chunks(PAGE_BYTES).zip(found.chunks(PAGE_BYTES));
        for (i, (expected, found)) in blocks.enumerate().filter(|(_, (e, f))| e != f) {
            let block = start + (i * PAGE_BYTES) as u64;
            let mut wrong = difference(Place::Disk, block, expected, found, String::new(), "");
            let request = first.clone().find(|piece| {
                (piece.offset..piece.offset + piece.len as u64).contains(&wrong.offset)
            });
            wrong.role = describe(plan, wrong.offset, request.map(|piece| piece.request));
            verdict.add(wrong);
        }
    }
    verdict.disk_bytes = end;
    Ok(())
}

/// Returns the writes, by offset, in pieces that lie in one block on the disk and one page in
/// memory.
fn written(plan: &Plan) -> Vec<Written<'_>> {
    let mut written = Vec::new();
    for request in plan.requests().iter().filter(|r| r.direction == Direction::Write) {
        for (segment, offset) in request.pieces() {
            for (at, len) in by_page(segment.address, segment.len as usize) {
                let (address, offset) = (segment.address + at as u64, offset + at as u64);
                for (at, len) in by_page(offset, len) {
                    let (address, offset) = (address + at as u64, offset + at as u64);
                    written.push(Written { offset, address, len, request });
                }
            }
        }
    }
    written.sort_unstable_by_key(|piece| piece.offset);
    written
}

fn describe(plan: &Plan, offset: u64, request: Option<&Request>) -> String {
    let Some(disk) = &plan.params().disk else { return String::new() };
    match request {
        Some(Request { queue, index, .. }) => {
            format!("written by request {index} of queue {queue}")
        }
        None if offset < disk.read_sectors * 512 => "only ever read".to_owned(),
        None if offset < disk.disk_sectors * 512 => "written by no request".to_owned(),
        None => "behind the sectors of the plan".to_owned(),
    }
}

fn length(mut file: &File, what: &'static str) -> Result<u64, VerifyError> {
    // A block device has no length in its metadata, so seek to its end.
    file.seek(SeekFrom::End(0)).map_err(|source| VerifyError::Read {
        what,
        offset: 0,
        len: 0,
        source,
    })
}

fn read(file: &File, what: &'static str, offset: u64, to: &mut [u8]) -> Result<(), VerifyError> {
    let len = to.len() as u64;
    file.read_exact_at(to, offset).map_err(|source| VerifyError::Read { what, offset, len, source })
}
