// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output that never blocks its writer: a queue of bytes, and a thread that writes them.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::signals::block_signals;
use crate::sync::LockExt;

/// Capacity of the queue, in bytes. Output beyond it is lost.
const CAPACITY: usize = 1 << 20;

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<u8>,
    /// Bytes that the thread is writing.
    under_way: usize,
    /// The amount lost: bytes with [`Overflow::Warn`], and with [`Overflow::Count`] writes since
    /// the last note in the output.
    lost: u64,
    /// Whether the thread ends once the queue is empty.
    closed: bool,
    /// Whether the last byte, if any, did not end a line.
    in_line: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The report of output that does not fit and is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overflow {
    /// The log warns once. A write is kept as far as it fits.
    Warn,
    /// The output holds, in place of the lost writes, their number. A write is kept as a whole or
    /// not at all.
    Count,
}

/// The writable end of a queue. Clones share the queue.
///
/// A guest's console may have no reader, and a vCPU that waited for one could not be paused.
#[derive(Clone, Debug)]
pub(crate) struct Spool(Arc<Shared>, Overflow);

impl Spool {
    /// Starts a thread called `name`, which passes the queue on as fast as `output` takes it.
    ///
    /// # Errors
    ///
    /// The system's error, if it has no more threads.
    pub(crate) fn new(
        mut output: impl Write + Send + 'static,
        name: &str,
        overflow: Overflow,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let ours = shared.clone();
        let pass_on = move || {
            // The log's thread starts before the others, so it does not inherit the blocked
            // signals.
            let _ = block_signals();
            let mut bytes = Vec::new();
            loop {
                let mut state = ours.state.lock_always();
                state.under_way = 0;
                ours.changed.notify_all();
                while state.kept.is_empty() {
                    if state.closed {
                        return;
                    }
                    state = ours.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                bytes.clear();
                bytes.extend(state.kept.drain(..));
                if overflow == Overflow::Count && state.lost > 0 {
                    let lost = std::mem::take(&mut state.lost);
                    let line =
                        format!("({lost} messages were lost here: the output was not read)\n");
                    bytes.extend(line.as_bytes());
                }
                state.under_way = bytes.len();
                drop(state);
                // A console that cannot be written is no reason to stop the guest.
                if let Err(error) = output.write_all(&bytes).and_then(|()| output.flush())
                    && overflow == Overflow::Warn
                {
                    log::debug!("cannot write the serial output: {error}");
                }
            }
        };
        thread::Builder::new().name(name.into()).spawn(pass_on)?;
        Ok(Spool(shared, overflow))
    }

    /// Makes the thread end once the queue is empty.
    pub(crate) fn close(&self) {
        self.0.state.lock_always().closed = true;
        self.0.changed.notify_all();
    }

    /// Ends the last line, if it has no end yet.
    pub(crate) fn end_line(&self) {
        if self.0.state.lock_always().in_line {
            let _ = self.clone().write_all(b"\n");
        }
    }

    /// Waits until all output is passed on, at most for `within`.
    pub(crate) fn drain(&self, within: Duration) {
        let due = Instant::now() + within;
        let mut state = self.0.state.lock_always();
        while !state.kept.is_empty() || state.under_way > 0 {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.0.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock_always();
        state.in_line = bytes.last().map_or(state.in_line, |last| *last != b'\n');
        let fits = bytes.len().min(CAPACITY - state.kept.len());
        let mut warn = false;
        if fits == bytes.len() {
            state.kept.extend(bytes);
        } else if self.1 == Overflow::Count {
            state.lost += 1;
        } else {
            state.kept.extend(&bytes[..fits]);
            warn = state.lost == 0;
            state.lost += (bytes.len() - fits) as u64;
        }
        drop(state);
        self.0.changed.notify_all();
        if warn {
            log::warn!(
                "the guest's console is not read; its output is lost after {CAPACITY} bytes; read \
                 it, or use --serial file=PATH or --serial off"
            );
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn all_of_it_is_passed_on_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut spool = Spool::new(writer, "console", Overflow::Warn).unwrap();
        let all: Vec<u8> = (0..=u8::MAX).cycle().take(200_000).collect();
        let sent = all.clone();
        let sender = thread::spawn(move || {
            for bytes in sent.chunks(1000) {
                spool.write_all(bytes).unwrap();
            }
            spool.drain(Duration::from_secs(20));
        });
        let mut read = vec![0; all.len()];
        reader.read_exact(&mut read).unwrap();
        sender.join().unwrap();
        assert!(read == all);
    }

    #[test]
    fn unread_spool_blocks_no_writer() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut spool = Spool::new(writer, "console", Overflow::Warn).unwrap();
        let begun = Instant::now();
        for _ in 0..3 * CAPACITY / 4096 {
            spool.write_all(&[7; 4096]).unwrap();
        }
        spool.drain(Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let state = spool.0.state.lock_always();
        assert!(state.lost > 0 && state.kept.len() <= CAPACITY);
        drop(state);
        // A late reader gets the first output.
        let mut read = vec![0; CAPACITY];
        reader.read_exact(&mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn lost_messages_are_counted_in_their_place() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut spool = Spool::new(writer, "log", Overflow::Count).unwrap();
        let line = [&[b'x'; 99][..], b"\n"].concat();
        // More than the pipe and the queue hold together.
        let lines = 3 * CAPACITY / line.len();
        (0..lines).for_each(|_| spool.write_all(&line).unwrap());
        spool.close();
        // The output ends when the thread has passed on all of it.
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        let told = all.lines().filter_map(|line| line.strip_prefix('('));
        let numbers = told.map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap());
        let said: usize = numbers.sum();
        assert!(said > 0);
        let kept = all.lines().filter(|line| line.starts_with('x')).count();
        assert!(all.lines().all(|line| line.len() == 99 || line.starts_with('(')), "no halves");
        assert_eq!(kept + said, lines);
    }
}
