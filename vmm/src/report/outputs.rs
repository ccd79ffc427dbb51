// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output files (report, timeline, console log), checked to be writable before the VM starts.

use std::fs::{self, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Output files that were found to be writable. Files that the check created and that are still
/// empty are removed again, unless the run completes; existing files are left unchanged.
#[derive(Debug, Default)]
pub(crate) struct Outputs {
    known: Vec<(&'static str, Metadata)>,
    made: Vec<PathBuf>,
}

impl Outputs {
    /// Checks that `path`, which the user gave with `option`, can be written. It must not be one of
    /// `inputs`, and a regular file must not be given twice.
    ///
    /// # Errors
    ///
    /// One line that names the option and the cause.
    pub(crate) fn add(
        &mut self,
        option: &'static str,
        path: &Path,
        inputs: &[&Path],
    ) -> Result<(), Error> {
        let refused = |why: &dyn std::fmt::Display| {
            Error::failed(format!(
                "{option}: cannot write {}: {why}; name a writable file",
                path.display()
            ))
        };
        let mut options = OpenOptions::new();
        // A FIFO without a reader is refused; without O_NONBLOCK, opening it would block.
        options.write(true).custom_flags(libc::O_NONBLOCK);
        let file = match options.clone().create_new(true).open(path) {
            Ok(file) => {
                self.made.push(path.into());
                Ok(file)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path),
            Err(error) => Err(error),
        };
        let metadata = file.and_then(|file| file.metadata()).map_err(|error| refused(&error))?;
        if metadata.file_type().is_block_device() {
            return Err(refused(&"it is a block device"));
        }
        let same =
            |other: &Metadata| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino());
        let input = inputs.iter().find(|input| fs::metadata(input).is_ok_and(|it| same(&it)));
        if let Some(input) = input {
            return Err(refused(&format_args!("it is the input {}", input.display())));
        }
        // A terminal or /dev/null can serve several options.
        let known = self.known.iter().find(|(_, other)| metadata.is_file() && same(other));
        if let Some((other, _)) = known {
            return Err(refused(&format_args!("{other} writes it")));
        }
        self.known.push((option, metadata));
        Ok(())
    }

    /// Keeps all files.
    pub(crate) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        for path in &self.made {
            // A file that has content by now may be of use.
            if fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_changed_by_a_trial() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("old"), "old").unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--report", &at("old"), &[]).unwrap();
        outputs.add("--timeline", &at("new"), &[]).unwrap();
        outputs.add("--serial", Path::new("/dev/null"), &[]).unwrap();
        drop(outputs);
        assert_eq!(fs::read_to_string(at("old")).unwrap(), "old");
        assert!(!at("new").exists());
        let mut outputs = Outputs::default();
        outputs.add("--report", &at("new"), &[]).unwrap();
        outputs.keep();
        assert!(at("new").exists());
    }

    #[test]
    fn files_already_in_use_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("memory"), "content").unwrap();
        fs::hard_link(at("memory"), at("linked")).unwrap();
        let mut outputs = Outputs::default();
        let memory = at("memory");
        let error = outputs.add("--report", &at("linked"), &[&memory]).unwrap_err().to_string();
        assert!(error.contains("--report") && error.contains("is the input"), "{error}");
        assert_eq!(fs::read_to_string(memory).unwrap(), "content");
        outputs.add("--report", &at("new"), &[]).unwrap();
        let error = outputs.add("--timeline", &at("new"), &[]).unwrap_err().to_string();
        assert!(error.contains("--report writes it"), "{error}");
    }

    #[test]
    fn fifo_without_reader_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let error = Outputs::default().add("--report", &path, &[]).unwrap_err().to_string();
        assert!(error.contains("name a writable file"), "{error}");
    }
}
