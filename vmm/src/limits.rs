// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The resource limits of the process, and advice for errors that come from one.
//!
//! To the kernel, guest memory is a file (a memfd). A VM needs several dozen file descriptors, and
//! starts threads. It locks no memory, so `RLIMIT_MEMLOCK` does not apply.

use std::fs;
use std::path::{Path, PathBuf};

use demand_uffd::make_room_for_descriptors;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prepares the process for its limits. The caller must do this first of all.
///
/// A write beyond the file size limit becomes an error, instead of a signal that ends the process
/// without a message. The limit of open files is raised as far as the user may: its default is low
/// for the sake of programs that use `select`. The table of open files gets its final size, which
/// takes longer once there are threads.
pub fn prepare() {
    // SAFETY: ignoring a signal installs no handler, so no code of this process runs on it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let files = getrlimit(Resource::Nofile);
    // The limit stays unchanged if raising it is not permitted.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    make_room_for_descriptors();
}

/// The origin of an exhausted resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// A limit of the process, its user or the system: another user or another host could perform
    /// the operation.
    Host,
    /// The space of a file system, or the user's share of it.
    Disk,
}

/// Fits the remedy at the end of an error's line to the error's number, if that stands for an
/// exhausted resource. This is the one place that knows these numbers' remedies: libraries cannot,
/// because a number comes from any step. Returns the line, and the limit.
pub(crate) fn advise(line: String) -> (String, Option<Limit>) {
    match advise_under(&line, |resource| getrlimit(resource).current) {
        Some((advised, limit)) => (advised, Some(limit)),
        None => (line, None),
    }
}

fn advise_under(line: &str, limit: impl Fn(Resource) -> Option<u64>) -> Option<(String, Limit)> {
    let says = |errno| line.find(&format!("(os error {errno})"));
    // Keeps a remedy that an earlier error of the chain was given.
    let with = |advised: String, advice: &str, limit| {
        Some((if line.contains(advice) { line.to_owned() } else { advised }, limit))
    };
    let replaced = |at: usize, advice: String, limit| {
        let end = line[at..].find(')').map_or(line.len(), |len| at + len + 1);
        with(format!("{}; {advice}", &line[..end]), &advice, limit)
    };
    let number = |resource| limit(resource).map_or("any number of".into(), |n| n.to_string());
    if let Some(at) = says(libc::EMFILE) {
        let files = number(Resource::Nofile);
        let advice =
            format!("this process may have {files} files open: raise the limit (ulimit -n)");
        return replaced(at, advice, Limit::Host);
    }
    if let Some(at) = says(libc::ENFILE) {
        let advice = "raise the system's limit of open files (sysctl fs.file-max)";
        return replaced(at, advice.into(), Limit::Host);
    }
    if let (Some(at), Some(bytes)) = (says(libc::EFBIG), limit(Resource::Fsize)) {
        let advice = format!(
            "a file may have {bytes} bytes, and guest memory counts as one: raise the limit \
             (ulimit -f)"
        );
        return replaced(at, advice, Limit::Host);
    }
    if let (Some(_), Some(bytes)) = (says(libc::ENOMEM), limit(Resource::As)) {
        let advice = format!("or raise the limit of address space, {bytes} bytes (ulimit -v)");
        return with(format!("{line}; {advice}"), &advice, Limit::Host);
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
        let advice =
            format!("the user may have {threads} threads (ulimit -u){cgroups}: raise the limit");
        return replaced(at, advice, Limit::Host);
    }
    // Pools of huge pages and snapshots have remedies of their own.
    let is_known = line.contains("huge pages") || line.contains("free space");
    match (says(libc::ENOSPC), says(libc::EDQUOT), is_known) {
        (Some(at), _, false) => {
            let advice = "free some space there, or name a file on another disk";
            replaced(at, advice.into(), Limit::Disk)
        }
        (None, Some(at), false) => {
            let advice = "raise the quota, or name a file where it has room";
            replaced(at, advice.into(), Limit::Disk)
        }
        _ => None,
    }
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

    fn under_limits(line: &str) -> Option<(String, Limit)> {
        advise_under(line, |resource| match resource {
            Resource::Nofile => Some(20),
            Resource::Fsize => Some(1000),
            Resource::As => Some(2000),
            _ => Some(3),
        })
    }

    #[test]
    fn error_names_its_limit() {
        for (line, limit, starts, ends) in [
            (
                "make it: Too many open files (os error 24); free memory",
                Limit::Host,
                "make it: Too many open files (os error 24); this process may have 20 ",
                "(ulimit -n)",
            ),
            (
                "make it: x (os error 23); wait",
                Limit::Host,
                "make it: x (os error 23); raise",
                "file-max)",
            ),
            (
                "make it: x (os error 27)",
                Limit::Host,
                "make it: x (os error 27); a file may have 1000",
                "-f)",
            ),
            (
                "make it: x (os error 12); free memory",
                Limit::Host,
                "make it: x (os error 12); free memory; or raise",
                "2000 bytes (ulimit -v)",
            ),
            (
                "start a thread: x (os error 11); wait",
                Limit::Host,
                "start a thread: x (os error 11); the user may have 3 threads (ulimit -u)",
                "raise the limit",
            ),
            (
                "write it: x (os error 28); name a writable file",
                Limit::Disk,
                "write it: x (os error 28); free some space",
                "another disk",
            ),
            (
                "write it: x (os error 122); name a writable file",
                Limit::Disk,
                "write it: x (os error 122); raise the quota",
                "has room",
            ),
        ] {
            let (advised, found) = under_limits(line).unwrap();
            assert!(advised.starts_with(starts) && advised.ends_with(ends), "{advised}");
            assert_eq!(found, limit, "{line}");
            // As the cause of another error.
            let outer = format!("{advised}; and the VM stays paused");
            assert_eq!(under_limits(&outer), Some((outer.clone(), limit)));
        }
        for line in [
            "read: x (os error 11); again",
            "open: x (os error 2); name a file",
            "allocate: x (os error 28); add huge pages",
        ] {
            assert_eq!(under_limits(line), None);
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
