// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's log: complaints are passed on, and so is the message that the kernel has noticed to
//! be a copy.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use guest_work::Line;

use crate::console::{say, wrong};

const PATH: &str = "/dev/kmsg";

/// The substrings that mark a complaint, as kernels from 6.1 on write them.
const COMPLAINTS: [&str; 21] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "soft lockup",
    "hard LOCKUP",
    // "INFO: task init:1 blocked for more than 120 seconds."
    "blocked for more than",
    // "rcu: INFO: rcu_sched self-detected stall on CPU", "detected stalls on CPUs"
    "detected stall",
    "detected expedited stall",
    // "clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable"
    "as unstable",
    "TSC ADJUST",
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2: Error",
    "Aborting journal",
    "general protection fault",
    "Bad page",
    "Out of memory",
    "nobody cared",
    "segfault at",
    "Initramfs unpacking failed",
];
/// See `add_vmfork_randomness` in drivers/char/random.c.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Returns the number of complaints so far.
pub(crate) fn complaints() -> u64 {
    COUNT.load(Ordering::SeqCst)
}

/// Watches the log from its start, in a thread.
pub(crate) fn watch() {
    let mut log = File::open(PATH)
        .unwrap_or_else(|error| wrong("work", &format!("{PATH} could not be opened: {error}")));
    thread::spawn(move || {
        let mut record = [0; 8192];
        loop {
            // Each read waits for one record, and returns it.
            match log.read(&mut record) {
                Ok(n) => {
                    if let Some(line) = line_of(&String::from_utf8_lossy(&record[..n])) {
                        if matches!(line, Line::Kernel(_)) {
                            COUNT.fetch_add(1, Ordering::SeqCst);
                        }
                        say(&line);
                    }
                }
                // Records were overwritten before they could be read: continue with the oldest.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => wrong("work", &format!("{PATH} could not be read: {error}")),
            }
        }
    });
}

/// Returns the line to print for a record, "prefix;message" and possibly more lines.
fn line_of(record: &str) -> Option<Line> {
    let first = record.lines().next()?;
    let (prefix, message) = first.split_once(';')?;
    // Facility 0 is the kernel; programs may also write here. See dev-kmsg in the kernel's ABI.
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    if priority >> 3 != 0 {
        return None;
    }
    if message.contains(RESEEDED) {
        return Some(Line::Reseeded);
    }
    COMPLAINTS
        .iter()
        .any(|complaint| message.contains(complaint))
        .then(|| Line::Kernel(message.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_complaints_are_distinguished_from_other_lines() {
        for (record, line) in [
            ("6,1,2,-;smp: Brought up 1 node, 2 CPUs\n", None),
            ("5,1,2,-;random: crng reseeded due to virtual machine fork\n", Some(Line::Reseeded)),
            (
                "4,1,2,-;watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n SUBSYSTEM=x\n",
                Some(Line::Kernel("watchdog: BUG: soft lockup - CPU#0 stuck for 22s!".into())),
            ),
            (
                "3,1,2,-;INFO: task jbd2:9 blocked for more than 120 seconds.\n",
                Some(Line::Kernel("INFO: task jbd2:9 blocked for more than 120 seconds.".into())),
            ),
            // From a program.
            ("12,1,2,-;BUG: not the kernel's\n", None),
        ] {
            assert_eq!(line_of(record), line, "{record}");
        }
    }
}
