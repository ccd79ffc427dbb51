// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks the back-end's writes to its used rings.

use crate::plan::Plan;
use crate::rings::Request;
use crate::verify::{Difference, FinalMemory, Piece, Place, Verdict, VerifyError, push_known};

/// Checks the used rings, and adds the bytes in them as known, because all errors in them are
/// reported here.
pub(crate) fn check(
    plan: &Plan,
    memory: &FinalMemory<'_>,
    pieces: &mut Vec<Piece>,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let Some(rings) = plan.rings() else { return Ok(()) };
    let windows = plan.windows();
    for (number, queue) in rings.queues().iter().enumerate() {
        let mut wrong = |offset, expected: u64, found: u64, bytes, note: &str| {
            let (role, note) = (format!("used ring of queue {number}"), note.to_owned());
            let (place, offset) = (Place::Ring, windows.guest_address(offset));
            verdict.add(Difference { place, offset, expected, found, bytes, role, note });
        };
        let mut used = vec![0; 4 + 8 * usize::from(queue.requests)];
        memory.read(windows.packed(queue.used), &mut used)?;
        push_known(pieces, queue.used, &used);
        let (start, elements) = used.split_at(4);
        let (flags, index) = (half(&start[..2]), half(&start[2..]));
        // A device may suppress notifications.
        if flags > 1 {
            wrong(queue.used, 0, flags.into(), 2, "the flags");
        }
        if index != queue.requests {
            let (expected, found) = (queue.requests.into(), index.into());
            wrong(queue.used_index(), expected, found, 2, "the number of answers");
        }
        let mut event = [0; 2];
        memory.read(windows.packed(queue.avail_event()), &mut event)?;
        push_known(pieces, queue.avail_event(), &event);
        if half(&event) > queue.requests {
            wrong(queue.avail_event(), 0, half(&event).into(), 2, "the avail_event field");
        }

        let mut by_head: Vec<Option<&Request>> = vec![None; queue.size.into()];
        for request in rings.requests().iter().filter(|r| usize::from(r.queue) == number) {
            by_head[usize::from(request.head())] = Some(request);
        }
        let (elements, _) = elements.as_chunks::<8>();
        for (i, element) in (0..).zip(elements) {
            let at = queue.used_element(i);
            let (id, len) = element.split_at(4);
            let (id, len) = (word(id), word(len));
            // Each request is answered once.
            let Some(request) = by_head.get_mut(id as usize).and_then(Option::take) else {
                wrong(at, 0, id.into(), 4, "no such request, or one that was answered before");
                continue;
            };
            // Devices differ in the lengths they report, but none may write more than it is
            // allowed.
            if u64::from(len) > request.writable_bytes() {
                let note = "a length that is more than the device may write";
                wrong(at + 4, request.writable_bytes(), len.into(), 4, note);
            }
        }
    }
    Ok(())
}

fn half(bytes: &[u8]) -> u16 {
    bytes.first_chunk().copied().map_or(0, u16::from_le_bytes)
}

fn word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().copied().map_or(0, u32::from_le_bytes)
}
