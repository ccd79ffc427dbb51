// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ctrl-C, as a flag.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::register_signal_handler;

use crate::Result;

static RAISED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    RAISED.store(true, Ordering::Relaxed);
}

/// Makes Ctrl-C set the flag instead of ending the process.
///
/// # Errors
///
/// The system's error for the signal handler.
pub fn catch() -> Result<()> {
    Ok(register_signal_handler(libc::SIGINT, on_interrupt)?)
}

/// Returns whether Ctrl-C was pressed.
pub fn raised() -> bool {
    RAISED.load(Ordering::Relaxed)
}
