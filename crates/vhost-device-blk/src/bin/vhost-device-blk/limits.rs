// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The resource limits of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prepares the process for its resource limits. A write beyond the file size limit becomes an
/// error instead of a signal that ends the process silently; the limit of open files is raised as
/// far as the user may.
pub(crate) fn prepare() {
    // SAFETY: ignoring a signal installs no handler, so no code of this process runs on it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let files = getrlimit(Resource::Nofile);
    // If the host refuses, the limit stays unchanged.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
}

/// Files that the daemon and the process of a front-end have open, besides those of the queues: the
/// disk, the socket, the log, signals, and up to eight memory regions of the front-end.
const BASE_FILES: u64 = 24;

/// Files for each queue: its eventfds, and those of its thread.
const FILES_PER_QUEUE: u64 = 7;

/// Warns if this process may have too few files open for a front-end with all queues. It is not an
/// error, because a front-end may use fewer.
pub(crate) fn warn_of_few_files(num_queues: u16) {
    let needed = BASE_FILES + FILES_PER_QUEUE * u64::from(num_queues);
    if let Some(most) = getrlimit(Resource::Nofile).current
        && most < needed
    {
        log::warn!(
            "this process may have {most} files open, and serving {num_queues} queues can need \
             {needed}: a front-end may be disconnected; raise the limit (ulimit -n)"
        );
    }
}
