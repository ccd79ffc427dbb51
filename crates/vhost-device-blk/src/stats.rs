// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The outputs of the counters: a file, and a line in the log.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::counters::{Counters, Snapshot};
use crate::error::{Error, Result};

/// Writes the counters to a file and to the log.
pub(crate) struct Stats {
    counters: Arc<Counters>,
    file: Option<PathBuf>,
    interval: Option<Duration>,
    next: Option<Instant>,
}

impl Stats {
    pub(crate) fn new(
        counters: Arc<Counters>,
        file: Option<PathBuf>,
        interval: Option<Duration>,
    ) -> Self {
        let next = interval.map(|interval| Instant::now() + interval);
        Stats { counters, file, interval, next }
    }

    /// Writes the file, if there is one.
    ///
    /// # Errors
    /// [`Error::Stats`] with the host's error.
    pub(crate) fn write(&self) -> Result<()> {
        match &self.file {
            Some(path) => write(&self.counters.snapshot(), path)
                .map_err(|source| Error::Stats { path: path.clone(), source }),
            None => Ok(()),
        }
    }

    /// Writes the counters to the file, and then to the log, as one line of JSON. A failure is
    /// logged.
    pub(crate) fn report(&self) {
        if let Err(error) = self.write() {
            log::error!("{error}");
        }
        match serde_json::to_string(&self.counters.snapshot()) {
            Ok(line) => log::info!("{line}"),
            Err(error) => log::error!("cannot report the counters: {error}"),
        }
    }

    /// Returns the time until the next report, if reports are regular.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        self.next.map(|next| next.saturating_duration_since(Instant::now()))
    }

    /// Reports if it is time to.
    pub(crate) fn report_if_due(&mut self) {
        let (Some(next), Some(interval)) = (self.next, self.interval) else { return };
        let now = Instant::now();
        if now >= next {
            self.report();
            // Reports that were missed, as while the host slept, are not made up for.
            self.next = Some((next + interval).max(now));
        }
    }
}

/// Writes the counters to `path` as JSON. A file is replaced as a whole, so that a reader sees
/// either the old one or the new one; anything else, such as a pipe, is written to.
fn write(snapshot: &Snapshot, path: &Path) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(snapshot).map_err(io::Error::other)?;
    text.push('\n');
    // A link to a file stays a link.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    if fs::metadata(&target).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // A FIFO without a reader is an error; without O_NONBLOCK, opening it would block.
        let mut file = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&target)?;
        return file.write_all(text.as_bytes());
    }
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let new = target.with_file_name(name);
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &target))
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, Mode};
    use std::os::unix::fs::symlink;

    #[test]
    fn file_is_replaced_as_a_whole() {
        let snapshot = Counters::new(2).unwrap().snapshot();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&snapshot, &at("stats")).unwrap();
        let old = File::open(at("stats")).unwrap();
        symlink(at("stats"), at("link")).unwrap();
        write(&Snapshot { reads: 2, ..snapshot.clone() }, &at("link")).unwrap();
        let value: serde_json::Value = serde_json::from_reader(old).unwrap();
        assert_eq!(value["reads"], 0, "a reader keeps the old file");
        let text = fs::read_to_string(at("stats")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&value["reads"], value["queues"].as_array().unwrap().len()), (&2.into(), 2));
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");

        assert!(write(&snapshot, &at("absent/stats")).is_err());
        assert!(write(&snapshot, dir.path()).is_err());
    }

    /// To replace a device, such as a terminal, would harm other programs.
    #[test]
    fn pipe_is_written_to() {
        let snapshot = Counters::new(1).unwrap().snapshot();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        assert!(write(&snapshot, &path).is_err(), "it has no reader");
        let options = File::options().read(true).custom_flags(libc::O_NONBLOCK).clone();
        let reader = options.open(&path).unwrap();
        write(&snapshot, &path).unwrap();
        let value: serde_json::Value = serde_json::from_reader(reader).unwrap();
        assert_eq!(value["reads"], 0);
    }

    #[test]
    fn reports_are_regular() {
        let counters = Arc::new(Counters::new(1).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stats");
        let interval = Some(Duration::from_millis(20));
        let mut stats = Stats::new(counters.clone(), Some(file.clone()), interval);
        assert!(stats.time_left().is_some_and(|left| left <= Duration::from_millis(20)));
        std::thread::sleep(Duration::from_millis(25));
        stats.report_if_due();
        assert!(file.exists());
        let mut never = Stats::new(counters, None, None);
        assert_eq!(never.time_left(), None);
        never.report_if_due();
    }
}
