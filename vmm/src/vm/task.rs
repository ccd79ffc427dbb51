// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tasks of a VM on threads of their own.

use std::thread;

use crate::error::{Error, no_thread};

/// Runs `work` on a new thread.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let spawned = thread::Builder::new().name(name.into()).spawn(work);
    spawned.map(drop).map_err(|error| no_thread("run a task of the VM", error))
}
