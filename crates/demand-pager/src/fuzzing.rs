// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entry point for the fuzzer: arbitrary bytes in place of a pager.

use std::fs::File;

use demand_source::{Chunk, Destination, Part, Priority, Request, SourceError};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::connection::Staging;
use crate::options::PagerOptions;
use crate::queue::Queue;
use crate::receive::Receiver;

/// Length of each fault, in bytes.
const LEN: usize = 512;

/// Receives these bytes as answers to four faults with the tags 1 to 4.
///
/// # Panics
///
/// If a fault succeeds without all of its bytes.
pub fn answers(mut bytes: &[u8]) {
    let queue = Queue::new(PagerOptions::default().windows());
    let mut outcomes = Vec::new();
    for (offset, priority) in [(0, Priority::Demand), (LEN as u64, Priority::Fill)] {
        let (destination, content) = Destination::owned(vec![0xee; 2 * LEN]);
        let chunks = vec![Chunk { offset, destination }];
        let (parts, completion) = Part::all_of(Request { priority, chunks }, LEN);
        queue.push(priority, parts);
        outcomes.push((completion, content));
    }
    assert!(queue.next().is_some(), "the faults are sent");
    let staging = memfd_create("staging", MemfdFlags::CLOEXEC).map(File::from);
    let staging = staging.and_then(|memory| {
        rustix::fs::ftruncate(&memory, 2 * LEN as u64)?;
        Ok(Staging { memory, size: 2 * LEN as u64 })
    });
    let mut receiver =
        Receiver { queue: &queue, pager: "the fuzzer", staging: staging.ok(), answers: 0 };
    while receiver.answer(&mut bytes).is_ok() {}
    drop(queue.take_all());
    for (completion, content) in outcomes {
        match completion.wait() {
            Ok(()) => assert!(content.take().is_ok(), "a success has all bytes"),
            Err(SourceError::Short { wrote, .. }) => panic!("a success with {wrote} bytes"),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Reply;
    use demand_source::Retry;

    #[test]
    fn answers_of_all_kinds_are_received() {
        let replies = [
            Reply::Data { tag: 4, bytes: vec![1; LEN] },
            Reply::Zero { tag: 1 },
            Reply::Error { tag: 3, retry: Retry::Never, text: "\x1b".into() },
            Reply::Staged { tag: 2, offset: LEN as u64 },
            Reply::Staged { tag: 2, offset: 0 },
        ];
        let bytes: Vec<u8> = replies.iter().flat_map(Reply::encode).collect();
        for end in 0..=bytes.len() {
            answers(&bytes[..end]);
        }
    }
}
