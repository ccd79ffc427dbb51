// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output files (report, timeline, console log): checked to be writable before the VM starts, and
//! replaced as a whole at its end.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};

use crate::error::{Error, Kind};

/// An error from the check of an output file.
#[derive(Debug, thiserror::Error)]
#[error("{option}: cannot write {}: {fault}; name a writable file", path.display())]
pub struct OutputError {
    option: &'static str,
    path: PathBuf,
    #[source]
    fault: OutputFault,
}

impl From<OutputError> for Error {
    fn from(error: OutputError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// The fault of an output file.
#[derive(Debug, thiserror::Error)]
enum OutputFault {
    #[error("{0}")]
    Io(#[source] io::Error),
    #[error("it is a block device")]
    BlockDevice,
    #[error("it is the input {}", .0.display())]
    Input(PathBuf),
    #[error("{0} writes it")]
    Shared(&'static str),
}

/// An output file that was checked.
#[derive(Debug)]
struct Checked {
    option: &'static str,
    path: PathBuf,
    identity: Identity,
    destination: Destination,
}

/// The identity of a file: two paths may lead to the same one.
#[derive(Debug, PartialEq, Eq)]
enum Identity {
    /// An existing regular file: its device and inode.
    Existing(u64, u64),
    /// A file that does not exist yet.
    New(PathBuf),
    /// A terminal, a pipe or a device, which can serve several options.
    Shareable,
}

/// How an output is written.
#[derive(Debug)]
enum Destination {
    /// A regular file, which the output replaces.
    File,
    /// The file that this process already has as its standard output or standard error.
    Stdout,
    Stderr,
    /// A pipe, a device, or a descriptor of this process.
    Open(File),
}

/// Output files that were found to be writable. The check changes no existing file, and leaves none
/// behind.
#[derive(Debug, Default)]
pub struct Outputs(Vec<Checked>);

impl Outputs {
    /// Checks that `path`, which the user gave with `option`, can be written. It must not be one of
    /// `inputs`, and a regular file must not be given twice. A pipe is opened here and kept open,
    /// so that its reader waits for the output.
    ///
    /// # Errors
    ///
    /// One line that names the option and the cause.
    pub fn add(
        &mut self,
        option: &'static str,
        path: &Path,
        inputs: &[&Path],
    ) -> Result<(), OutputError> {
        let refused = |fault| OutputError { option, path: path.into(), fault };
        let io = |error| refused(OutputFault::Io(error));
        let (file, is_new) = open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.file_type().is_block_device() {
            return Err(refused(OutputFault::BlockDevice));
        }
        if let Some(input) = input_at(&metadata, inputs) {
            return Err(refused(OutputFault::Input(input.into())));
        }
        let identity = match (metadata.is_file(), is_new) {
            (false, _) => Identity::Shareable,
            (true, false) => Identity::Existing(metadata.dev(), metadata.ino()),
            (true, true) => {
                // It was only a trial.
                fs::remove_file(path).map_err(io)?;
                Identity::New(absolute(path))
            }
        };
        let is_known = |other: &&Checked| {
            // One that was new may exist by now.
            let exists = || fs::metadata(&other.path).is_ok_and(|it| same(&it, &metadata));
            identity != Identity::Shareable && (other.identity == identity || exists())
        };
        if let Some(other) = self.0.iter().find(is_known) {
            return Err(refused(OutputFault::Shared(other.option)));
        }
        let destination = destination(path, file, &metadata).map_err(io)?;
        self.0.push(Checked { option, path: path.into(), identity, destination });
        Ok(())
    }

    /// Checks that none of the files is one of `inputs`, which were not known before.
    ///
    /// # Errors
    ///
    /// One line that names the option and the input.
    pub fn check_inputs(&self, inputs: &[&Path]) -> Result<(), OutputError> {
        self.0.iter().try_for_each(|output| {
            let Checked { option, path, .. } = output;
            let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
            input_at(&metadata, inputs).map_or(Ok(()), |input| {
                let fault = OutputFault::Input(input.into());
                Err(OutputError { option, path: path.clone(), fault })
            })
        })
    }

    /// Forgets the file of `option`.
    pub fn remove(&mut self, option: &str) {
        self.0.retain(|output| output.option != option);
    }

    /// Returns whether the file of `option` was given.
    pub fn has(&self, option: &str) -> bool {
        self.0.iter().any(|output| output.option == option)
    }

    /// Writes `content` to the file of `option`, if it was given. A regular file holds all of it or
    /// remains as it was: it is written beside its destination and renamed. Where that cannot be
    /// (no permission in the folder, a mount point, several hard links), an existing file is
    /// overwritten.
    ///
    /// # Errors
    ///
    /// One line that names the option and the cause.
    pub fn write(&mut self, option: &str, content: &[u8]) -> Result<(), OutputError> {
        let Some(output) = self.0.iter_mut().find(|output| output.option == option) else {
            return Ok(());
        };
        let written = match &mut output.destination {
            Destination::File => replace(&output.path, content),
            Destination::Stdout => put(&mut io::stdout().lock(), content),
            Destination::Stderr => put(&mut io::stderr().lock(), content),
            Destination::Open(file) => put(file, content),
        };
        let Checked { option, path, .. } = output;
        written.map_err(|error| OutputError {
            option,
            path: path.clone(),
            fault: OutputFault::Io(error),
        })
    }
}

/// Returns the input that is this file.
fn input_at<'a>(output: &Metadata, inputs: &[&'a Path]) -> Option<&'a Path> {
    inputs.iter().find(|input| fs::metadata(input).is_ok_and(|it| same(&it, output))).copied()
}

/// Opens a file to see whether it can be written, and returns whether it had to be created.
fn open(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    // A FIFO without a reader is refused; without O_NONBLOCK, opening it would block.
    options.write(true).custom_flags(libc::O_NONBLOCK);
    match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        created => return created.map(|file| (file, true)),
    }
    match options.open(path) {
        // A socket has no path that can be opened, not even one below /proc. The log of a service
        // is a socket.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let standard = [own(io::stdout()), own(io::stderr())].into_iter().flatten();
            let found = fs::metadata(path)?;
            let mut standard =
                standard.filter(|file| file.metadata().is_ok_and(|it| same(&it, &found)));
            standard.next().map(|file| (file, false)).ok_or(error)
        }
        opened => opened.map(|file| (file, false)),
    }
}

/// Returns another descriptor of an open file.
fn own(file: impl AsFd) -> Option<File> {
    file.as_fd().try_clone_to_owned().ok().map(File::from)
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Returns the path of a file in a folder that exists, in one spelling.
fn absolute(path: &Path) -> PathBuf {
    let (folder, name) = (folder(path), path.file_name().unwrap_or_default());
    fs::canonicalize(folder).map_or_else(|_| path.into(), |folder| folder.join(name))
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn destination(path: &Path, file: File, metadata: &Metadata) -> io::Result<Destination> {
    let is = |fd: rustix::fd::BorrowedFd<'_>| {
        fstat(fd).is_ok_and(|it| (it.st_dev, it.st_ino) == (metadata.dev(), metadata.ino()))
    };
    // Even as a regular file: what was printed before must stay in it.
    if is(io::stdout().as_fd()) {
        return Ok(Destination::Stdout);
    }
    if is(io::stderr().as_fd()) {
        return Ok(Destination::Stderr);
    }
    if !metadata.is_file() {
        let flags = fcntl_getfl(&file)?;
        fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
        return Ok(Destination::Open(file));
    }
    let folder = fs::canonicalize(folder(path))?;
    // /dev/fd/N: the process that passed the descriptor reads this file, not one with its name.
    if folder.starts_with("/proc") && folder.ends_with("fd") {
        return Ok(Destination::Open(OpenOptions::new().append(true).open(path)?));
    }
    Ok(Destination::File)
}

fn put(to: &mut impl Write, content: &[u8]) -> io::Result<()> {
    to.write_all(content)?;
    to.flush()
}

/// Writes `content` to a file beside `path`, which then takes its place.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    // The end of a symbolic link is replaced, not the link.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let old = fs::metadata(&path).ok();
    if old.as_ref().is_some_and(|old| !old.is_file() || old.nlink() > 1) {
        return fs::write(&path, content);
    }
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    // The umask applies, as to any new file.
    let mode = old.as_ref().map_or(0o666, |old| old.permissions().mode());
    let made = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".partial")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(folder(&path));
    let mut partial = match made {
        Ok(partial) => partial,
        Err(_) if old.is_some() => return fs::write(&path, content),
        Err(error) => return Err(error),
    };
    partial.write_all(content)?;
    if let Some(old) = &old {
        partial.as_file().set_permissions(old.permissions())?;
        let new = partial.as_file().metadata()?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            return fs::write(&path, content);
        }
    }
    partial.as_file().sync_all()?;
    match partial.persist(&path) {
        Ok(_) => Ok(()),
        Err(_) if old.is_some() => fs::write(&path, content),
        Err(refused) => Err(refused.error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Folder(tempfile::tempdir().unwrap())
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn names(&self) -> Vec<OsString> {
            let mut names: Vec<_> = fs::read_dir(self.0.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        }

        fn fifo(&self, name: &str) -> PathBuf {
            let path = self.at(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            path
        }
    }

    #[test]
    fn nothing_is_changed_by_a_trial() {
        let folder = Folder::new();
        fs::write(folder.at("old"), "old").unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--report", &folder.at("old"), &[]).unwrap();
        outputs.add("--timeline", &folder.at("new"), &[]).unwrap();
        outputs.add("--serial", Path::new("/dev/null"), &[]).unwrap();
        assert_eq!(fs::read_to_string(folder.at("old")).unwrap(), "old");
        assert_eq!(folder.names(), ["old"]);
    }

    #[test]
    fn files_already_in_use_are_refused() {
        let folder = Folder::new();
        let memory = folder.at("memory");
        fs::write(&memory, "content").unwrap();
        fs::hard_link(&memory, folder.at("linked")).unwrap();
        let mut outputs = Outputs::default();
        let error = outputs.add("--report", &folder.at("linked"), &[&memory]).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("--report") && error.contains("is the input"), "{error}");
        assert_eq!(fs::read_to_string(memory).unwrap(), "content");
        outputs.add("--report", &folder.at("new"), &[]).unwrap();
        let again = folder.0.path().join(".").join("new");
        let error = outputs.add("--timeline", &again, &[]).unwrap_err().to_string();
        assert!(error.contains("--report writes it"), "{error}");
    }

    #[test]
    fn files_created_after_their_check_are_known() {
        let folder = Folder::new();
        let (log, kernel) = (folder.at("log"), folder.at("kernel"));
        fs::write(&kernel, "kernel").unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--log-file", &log, &[]).unwrap();
        outputs.check_inputs(&[&log, &kernel]).unwrap();
        fs::write(&log, "a line").unwrap();
        outputs.check_inputs(&[&kernel]).unwrap();
        let error = outputs.check_inputs(&[&kernel, &log]).unwrap_err().to_string();
        assert!(error.contains("--log-file") && error.contains("is the input"), "{error}");
        let error = outputs.add("serial", &log, &[]).unwrap_err().to_string();
        assert!(error.contains("--log-file writes it"), "{error}");
        outputs.add("serial", &folder.at("serial"), &[]).unwrap();
        outputs.remove("serial");
        outputs.add("serial", &folder.at("serial"), &[]).unwrap();
    }

    #[test]
    fn fifo_without_reader_is_refused_at_once() {
        let folder = Folder::new();
        let path = folder.fifo("fifo");
        let error = Outputs::default().add("--report", &path, &[]).unwrap_err().to_string();
        assert!(error.contains("name a writable file"), "{error}");
    }

    #[test]
    fn reader_of_fifo_gets_the_output() {
        let folder = Folder::new();
        let path = folder.fifo("fifo");
        let reads = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = rustix::fs::open(&path, reads, Mode::empty()).unwrap();
        fcntl_setfl(&reader, OFlags::RDONLY).unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--report", &path, &[]).unwrap();
        // More than a pipe holds, so the writer waits for the reader.
        let content = vec![b'x'; 1 << 20];
        let expected = content.clone();
        let writer = std::thread::spawn(move || outputs.write("--report", &content));
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        assert!(read == expected);
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn file_is_replaced_as_a_whole() {
        let folder = Folder::new();
        fs::write(folder.at("old"), "the old content, which is longer").unwrap();
        fs::set_permissions(folder.at("old"), Permissions::from_mode(0o640)).unwrap();
        symlink("old", folder.at("link")).unwrap();
        // It keeps the old content.
        let mut reader = File::open(folder.at("old")).unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--report", &folder.at("link"), &[]).unwrap();
        outputs.add("--timeline", &folder.at("new"), &[]).unwrap();
        outputs.write("--report", b"new").unwrap();
        outputs.write("--timeline", b"picture").unwrap();
        outputs.write("--serial", b"not given").unwrap();
        assert_eq!(fs::read_to_string(folder.at("old")).unwrap(), "new");
        assert_eq!(fs::read_to_string(folder.at("new")).unwrap(), "picture");
        assert!(fs::symlink_metadata(folder.at("link")).unwrap().is_symlink());
        let mode = fs::metadata(folder.at("old")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        let mut old = String::new();
        reader.read_to_string(&mut old).unwrap();
        assert_eq!(old, "the old content, which is longer");
        assert_eq!(folder.names(), ["link", "new", "old"]);
    }

    #[test]
    fn hard_links_stay_one_file() {
        let folder = Folder::new();
        fs::write(folder.at("one"), "old").unwrap();
        fs::hard_link(folder.at("one"), folder.at("other")).unwrap();
        let mut outputs = Outputs::default();
        outputs.add("--report", &folder.at("one"), &[]).unwrap();
        outputs.write("--report", b"new").unwrap();
        assert_eq!(fs::read_to_string(folder.at("other")).unwrap(), "new");
    }

    #[test]
    fn passed_descriptor_gets_the_output() {
        let folder = Folder::new();
        let mut file = File::create_new(folder.at("file")).unwrap();
        file.write_all(b"before, ").unwrap();
        let path = PathBuf::from(format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
        let mut outputs = Outputs::default();
        outputs.add("--report", &path, &[]).unwrap();
        outputs.write("--report", b"after").unwrap();
        assert_eq!(fs::read_to_string(folder.at("file")).unwrap(), "before, after");
        assert_eq!(file.metadata().unwrap().nlink(), 1);
    }
}
