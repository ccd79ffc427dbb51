// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output that never makes its writer wait: what is written is kept, and passed on by a thread.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that are kept at most; what comes beyond that is lost.
const CAPACITY: usize = 1 << 20;

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<u8>,
    /// Bytes that are being passed on.
    under_way: usize,
    lost: u64,
    /// Nobody writes any more.
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that is written to. Clones are the same one.
///
/// A guest's console is read by whoever likes to, or by nobody; a vCPU that waited for that could
/// not be paused.
#[derive(Clone, Debug)]
pub(crate) struct Spool(Arc<Shared>);

impl Spool {
    /// Passes on what is written to `output`, as fast as that takes it.
    ///
    /// # Errors
    ///
    /// The system's, if there is no thread to be had.
    pub(crate) fn new(mut output: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let ours = shared.clone();
        let pass_on = move || {
            let mut bytes = Vec::new();
            loop {
                let mut state = ours.lock();
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
                state.under_way = bytes.len();
                drop(state);
                // The guest goes on: a console that cannot be written is no reason to stop.
                if let Err(error) = output.write_all(&bytes).and_then(|()| output.flush()) {
                    log::debug!("the serial port's output: {error}");
                }
            }
        };
        thread::Builder::new().name("console".into()).spawn(pass_on)?;
        Ok(Spool(shared))
    }

    /// Has the thread end when all is passed on.
    pub(crate) fn close(&self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }

    /// Waits until all is passed on, or `within` has gone by.
    pub(crate) fn drain(&self, within: Duration) {
        let due = Instant::now() + within;
        let mut state = self.0.lock();
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
        let mut state = self.0.lock();
        let fits = bytes.len().min(CAPACITY - state.kept.len());
        state.kept.extend(&bytes[..fits]);
        if fits < bytes.len() {
            if state.lost == 0 {
                log::warn!(
                    "the guest's console: nobody reads it, and what it says is lost after the \
                     first {CAPACITY} bytes; read it, or say --serial file=PATH or --serial off"
                );
            }
            state.lost += (bytes.len() - fits) as u64;
        }
        drop(state);
        self.0.changed.notify_all();
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
        let mut spool = Spool::new(writer).unwrap();
        let all: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
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
    fn nobody_waits_for_who_does_not_read() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut spool = Spool::new(writer).unwrap();
        let begun = Instant::now();
        for _ in 0..3 * CAPACITY / 4096 {
            spool.write_all(&[7; 4096]).unwrap();
        }
        spool.drain(Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let state = spool.0.lock();
        assert!(state.lost > 0 && state.kept.len() <= CAPACITY);
        drop(state);
        // Who reads later gets what was said first.
        let mut read = vec![0; CAPACITY];
        reader.read_exact(&mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
    }
}
