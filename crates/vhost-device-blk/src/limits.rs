// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The resource limits of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prepares the process for its resource limits. A write beyond the file size limit becomes an
/// error instead of a signal that ends the process silently; the limit of open files is raised as
/// far as the user may.
pub fn prepare() {
    // SAFETY: ignoring a signal installs no handler, so no code of this process runs on it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let files = getrlimit(Resource::Nofile);
    // If the host refuses, the limit stays unchanged.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
}
