// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Advice for errors that come from a limit of the process, of the user or of the host.

use std::io;

/// Returns the remedy for an error that means that something is used up.
pub(crate) fn for_error(error: &io::Error) -> Option<&'static str> {
    for_errno(error.raw_os_error()?)
}

/// Like [`for_error`], for an operation that may start a process or a thread.
pub(crate) fn for_start(error: &io::Error) -> Option<&'static str> {
    for_start_errno(error.raw_os_error()?)
}

/// Returns the remedy for an error of which only the text is known, as of a library.
pub(crate) fn for_text(text: &str) -> Option<&'static str> {
    let (_, rest) = text.split_once("(os error ")?;
    for_start_errno(rest.split_once(')')?.0.parse().ok()?)
}

/// Returns whether a remedy raises a limit: another user or another host has a higher one.
pub(crate) fn is_limit(advice: &str) -> bool {
    advice.starts_with("raise ")
}

fn for_start_errno(errno: i32) -> Option<&'static str> {
    match errno {
        libc::EAGAIN => Some("raise the limit of processes and threads (ulimit -u)"),
        errno => for_errno(errno),
    }
}

fn for_errno(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::EMFILE => "raise the limit of open files (ulimit -n)",
        libc::ENFILE => "raise the system's limit of open files (sysctl fs.file-max)",
        libc::EFBIG => "raise the limit of the size of files (ulimit -f)",
        libc::EDQUOT => "raise the quota of this user, or use another file system",
        libc::ENOSPC => "free space on its file system, or use another one",
        libc::ENOMEM => "free memory, or raise the limit of address space (ulimit -v)",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_fits_the_error() {
        let of = |errno| for_error(&io::Error::from_raw_os_error(errno));
        assert!(of(libc::EMFILE).is_some_and(|it| it.contains("ulimit -n") && is_limit(it)));
        assert!(of(libc::ENOSPC).is_some_and(|it| it.contains("free space") && !is_limit(it)));
        assert_eq!((of(libc::ENOENT), of(libc::EAGAIN)), (None, None));
        let error = io::Error::from_raw_os_error(libc::EAGAIN);
        assert!(for_start(&error).is_some_and(|it| it.contains("ulimit -u")));
        let text = "accept: Too many open files (os error 24)";
        assert_eq!(for_text(text), of(libc::EMFILE));
        assert_eq!(for_text("accept: (os error x)"), None);
    }
}
