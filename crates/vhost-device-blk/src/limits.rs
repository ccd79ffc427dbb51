// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limits that the process runs under.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prepares the process for its limits. A write beyond the limit of a file's size becomes an error,
/// in place of a signal that ends the process without a word; the limit of open files is raised as
/// far as the user may.
pub fn prepare() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let files = getrlimit(Resource::Nofile);
    // It stays as it is where that is not permitted.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
}
