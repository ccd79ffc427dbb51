// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The resource limits of the process, and advice for errors that come from one.
//!
//! To the kernel, guest memory is a file (a memfd). A VM needs several dozen file descriptors, and
//! starts threads. It locks no memory, so `RLIMIT_MEMLOCK` does not apply.

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prepares the process for its limits. The caller must do this first of all.
///
/// A write beyond the file size limit becomes an error, instead of a signal that ends the process
/// without a message. The limit of open files is raised as far as the user may: its default is low
/// for the sake of programs that use `select`.
pub fn prepare() {
    // SAFETY: ignoring a signal installs no handler, so no code of this process runs on it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let files = getrlimit(Resource::Nofile);
    // The limit stays unchanged if raising it is not permitted.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
}

/// Adds advice to an error's line if the error comes from a resource limit. The advice replaces or
/// extends the general remedy at the end of the line. Returns the line, and whether it was changed.
pub(crate) fn advise(line: String) -> (String, bool) {
    match advise_under(&line, |resource| getrlimit(resource).current) {
        Some(advised) => (advised, true),
        None => (line, false),
    }
}

fn advise_under(line: &str, limit: impl Fn(Resource) -> Option<u64>) -> Option<String> {
    let says = |errno| line.find(&format!("(os error {errno})"));
    let replaced = |at: usize, advice: &dyn fmt::Display| {
        let end = line[at..].find(')').map_or(line.len(), |len| at + len + 1);
        Some(format!("{}; {advice}", &line[..end]))
    };
    let number = |resource| limit(resource).map_or("any number of".into(), |n| n.to_string());
    if let Some(at) = says(libc::EMFILE) {
        let files = number(Resource::Nofile);
        return replaced(
            at,
            &format_args!("this process may have {files} files open: raise the limit (ulimit -n)"),
        );
    }
    if let Some(at) = says(libc::ENFILE) {
        return replaced(at, &"raise the system's limit of open files (sysctl fs.file-max)");
    }
    if let (Some(at), Some(bytes)) = (says(libc::EFBIG), limit(Resource::Fsize)) {
        return replaced(
            at,
            &format_args!(
                "a file may have {bytes} bytes, and guest memory counts as one: raise the limit \
                 (ulimit -f)"
            ),
        );
    }
    if let (Some(_), Some(bytes)) = (says(libc::ENOMEM), limit(Resource::As)) {
        return Some(format!(
            "{line}; or raise the limit of address space, {bytes} bytes (ulimit -v)"
        ));
    }
    // Other causes of EAGAIN have nothing to do with threads. The fault service consists of
    // threads.
    let starts_threads = line.contains("thread") || line.contains("service");
    if let (Some(at), true) = (says(libc::EAGAIN), starts_threads) {
        let threads = number(Resource::Nproc);
        let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let cgroups = cgroup_limit(Path::new(CGROUPS), &cgroup, "pids.max");
        let cgroups = cgroups.map_or(String::new(), |(path, most)| {
            format!(", and {} allows {most}", path.display())
        });
        return replaced(
            at,
            &format_args!(
                "the user may have {threads} threads (ulimit -u){cgroups}: raise the limit"
            ),
        );
    }
    None
}

/// The mount point of cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Returns the lowest limit `name` (cgroup v2) among a cgroup and its ancestors: the file, and its
/// value.
fn cgroup_limit(root: &Path, own: &str, name: &str) -> Option<(PathBuf, u64)> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let own = root.join(own);
    let files = own.ancestors().take_while(|path| path.starts_with(root));
    let limits = files.map(|path| path.join(name)).filter_map(|file| {
        let value = fs::read_to_string(&file).ok()?.trim().parse().ok()?;
        Some((file, value))
    });
    limits.min_by_key(|(_, value)| *value)
}

/// Warns if ordinary guest memory of `bytes` bytes exceeds the limit of this process's cgroup. This
/// is not an error: the guest may never use all of it, or the kernel may swap parts out.
pub(crate) fn warn_of_cgroup(bytes: u64) {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Some((file, most)) = cgroup_limit(Path::new(CGROUPS), &own, "memory.max")
        && most < bytes
    {
        log::warn!(
            "guest memory of {bytes} bytes is more than the {most} of {}: the kernel kills this \
             process if the guest uses more; raise that limit, or ask for less memory",
            file.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_its_limit() {
        let advised = |line: &str| {
            advise_under(line, |resource| match resource {
                Resource::Nofile => Some(20),
                Resource::Fsize => Some(1000),
                Resource::As => Some(2000),
                _ => Some(3),
            })
        };
        for (line, starts, ends) in [
            (
                "make it: Too many open files (os error 24); free memory",
                "make it: Too many open files (os error 24); this process may have 20 ",
                "(ulimit -n)",
            ),
            ("make it: x (os error 23); wait", "make it: x (os error 23); raise", "file-max)"),
            ("make it: x (os error 27)", "make it: x (os error 27); a file may have 1000", "-f)"),
            (
                "make it: x (os error 12); free memory",
                "make it: x (os error 12); free memory; or raise",
                "2000 bytes (ulimit -v)",
            ),
            (
                "start a thread: x (os error 11); wait",
                "start a thread: x (os error 11); the user may have 3 threads (ulimit -u)",
                "raise the limit",
            ),
        ] {
            let advised = advised(line).unwrap();
            assert!(advised.starts_with(starts) && advised.ends_with(ends), "{advised}");
        }
        for line in ["read: x (os error 11); again", "open: x (os error 2); name a file"] {
            assert_eq!(advised(line), None);
        }
        // EFBIG can also mean that a file is too large for its file system.
        assert_eq!(advise_under("x (os error 27); y", |_| None), None);
    }

    #[test]
    fn the_lowest_cgroup_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        for (file, value) in [
            ("a/memory.max", "4096\n"),
            ("a/b/memory.max", "max\n"),
            ("a/b/c/memory.max", "8192\n"),
        ] {
            fs::write(at(file), value).unwrap();
        }
        let limit = |own| cgroup_limit(root.path(), own, "memory.max");
        assert_eq!(limit("1:x:/y\n0::/a/b/c\n"), Some((at("a/memory.max"), 4096)));
        assert_eq!(limit("0::/\n"), None);
        assert_eq!(limit("4:memory:/a\n"), None);
    }
}
