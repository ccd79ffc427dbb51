// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unix sockets with paths, for the API's servers and clients: a listener that only its owner can
//! connect to and that replaces the socket of a dead process, and a connection that does not wait
//! for a server that hangs. See unix(7).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Largest number of connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// How long to wait while another process sets up a socket in the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// An error from creating the API's socket, without its path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The path is longer than a socket's address can hold.
    #[error("the path is longer than a socket's limit of 107 bytes; give a shorter one")]
    PathTooLong,
    /// The path cannot be a socket's.
    #[error("{0}")]
    Path(#[source] io::Error),
    /// The folder of the path cannot be opened and locked.
    #[error("its folder: {0}; name an existing folder")]
    Folder(#[source] io::Error),
    /// Another kind of file has this path.
    #[error("it exists and is not a socket; give another path")]
    NotASocket,
    /// Another process listens at this path.
    #[error("another process listens on it; give another path")]
    Taken,
    /// Whether another process listens at this path is unknown.
    #[error("it exists, and connecting to it fails: {0}; give another path")]
    Unknown(#[source] io::Error),
    /// The socket of a dead process cannot be removed.
    #[error("cannot remove the stale socket: {0}")]
    Stale(#[source] io::Error),
    /// The socket cannot be created or given its path.
    #[error("{0}; give a path in a folder where files can be created")]
    Create(#[source] io::Error),
    /// The socket's mode cannot be set.
    #[error("mode: {0}")]
    Mode(#[source] io::Error),
    /// The socket cannot listen.
    #[error("listen: {0}")]
    Listen(#[source] io::Error),
}

/// A socket that listens. Dropping it removes its file.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, which identify it.
    identity: (u64, u64),
}

impl Listener {
    /// Creates a socket at `path` that only this user can connect to (mode 0600). The socket of a
    /// dead process is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let address = address(path)?;
        // The lock keeps other processes from a stale socket between this check and its
        // replacement.
        let _lock = lock_folder(path).map_err(SocketError::Folder)?;
        remove_stale(path)?;
        let created = |error: Errno| SocketError::Create(error.into());
        let socket = new_socket(SocketFlags::CLOEXEC).map_err(created)?;
        // The file has the socket's mode from the moment of its creation.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| SocketError::Mode(error.into()))?;
        bind(&socket, &address).map_err(created)?;
        let listened = listen(&socket, BACKLOG).map_err(io::Error::from).and_then(|()| {
            let metadata = path.symlink_metadata()?;
            Ok((metadata.dev(), metadata.ino()))
        });
        match listened {
            Ok(identity) => Ok(Listener { listener: socket.into(), path: path.into(), identity }),
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(SocketError::Listen(error))
            }
        }
    }

    /// Returns the socket.
    pub(crate) fn socket(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Removes only this listener's file: another process may have put its socket there.
        let there = self.path.symlink_metadata();
        if there.is_ok_and(|file| (file.dev(), file.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Connects to the socket at `path`. The error is [`io::ErrorKind::WouldBlock`] if the listener's
/// backlog is full.
pub(crate) fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let address = address(path).map_err(io::Error::other)?;
    let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn new_socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => SocketError::PathTooLong,
        error => SocketError::Path(error.into()),
    })
}

/// Locks the directory of `path` for as long as the returned file is open.
fn lock_folder(path: &Path) -> io::Result<File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Opens directories only. To open a FIFO, for example, would wait for its writer.
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(folder)?;
    let begun = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(folder),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if begun.elapsed() > LOCK_PATIENCE => {
                return Err(io::Error::other("another process keeps it locked"));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Removes a socket without a listener.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let there = match path.symlink_metadata() {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SocketError::Path(error)),
    };
    if !there.file_type().is_socket() {
        return Err(SocketError::NotASocket);
    }
    match connect_now(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Ok(_) => return Err(SocketError::Taken),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(SocketError::Taken),
        Err(error) => return Err(SocketError::Unknown(error)),
    }
    std::fs::remove_file(path).map_err(SocketError::Stale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        connect_now(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err().to_string();
        assert!(error.contains("another process listens on it"), "{error}");
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn the_socket_of_a_successor_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let first = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        connect_now(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn impossible_socket_path_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("a".repeat(120));
        let error = Listener::bind(&long).unwrap_err().to_string();
        assert!(error.contains("107 bytes"), "{error}");
        let error = Listener::bind(&folder.path().join("no/api.sock")).unwrap_err().to_string();
        assert!(error.contains("name an existing folder"), "{error}");
    }

    #[test]
    fn pipe_is_no_folder_and_blocks_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, fifo, Mode::RUSR, 0).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            tell.send(Listener::bind(&pipe.join("api.sock")).unwrap_err().to_string())
        });
        let error = told.recv_timeout(Duration::from_secs(10)).expect("nobody waits");
        assert!(error.contains("Not a directory"), "{error}");
        assert!(error.contains("name an existing folder"), "{error}");
    }

    #[test]
    fn connect_does_not_wait_for_hanging_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let _listener = Listener::bind(&path).unwrap();
        let begun = Instant::now();
        let mut waiting = Vec::new();
        let error = loop {
            match connect_now(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 1000);
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(Listener::bind(&path).is_err());
    }
}
