// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The runtime that requests to remote sources run on.

use std::future::Future;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Handle, Runtime};

/// Number of threads: one decodes an answer while the other receives.
const THREADS: usize = 2;

/// Returns the runtime, which the first call starts. It lasts as long as the process.
pub(crate) fn handle() -> &'static Handle {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(THREADS)
                .thread_name("dp-remote")
                .enable_all()
                .build()
                // Without threads the process cannot serve faults either.
                .expect("the system has no threads left for remote sources")
        })
        .handle()
}

/// Waits for a future on the calling thread, which is none of the runtime's.
pub(crate) fn wait<F: Future>(future: F) -> F::Output {
    handle().block_on(future)
}
