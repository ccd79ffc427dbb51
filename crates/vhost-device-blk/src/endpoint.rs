// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket on which front-ends connect: bound by the daemon, or inherited from its parent.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketType};

use crate::error::{Error, Result};

/// The place where front-ends connect.
#[derive(Debug)]
pub enum Endpoint {
    /// A Unix socket that the daemon binds, and removes at its end.
    Path(PathBuf),
    /// A Unix stream socket that the daemon inherits: either it listens, or it is connected to the
    /// only front-end.
    Inherited(OwnedFd),
}

/// An open endpoint.
pub(crate) enum Socket {
    /// Serves one front-end after another.
    Listening(Listening),
    /// Serves this front-end alone.
    Connected(UnixStream),
}

/// A socket that front-ends connect to.
pub(crate) struct Listening {
    pub(crate) listener: UnixListener,
    /// The socket's file, if this process created it.
    _created: Option<Created>,
}

/// The file of a socket; removed when dropped.
struct Created {
    path: PathBuf,
    /// Device and inode, so that no other file is removed.
    id: (u64, u64),
}

impl Socket {
    /// Binds or takes over the socket of an endpoint.
    ///
    /// # Errors
    /// [`Error::Socket`] if the path cannot be bound, [`Error::Inherited`] if the descriptor is
    /// no Unix stream socket that listens or is connected.
    pub(crate) fn open(endpoint: Endpoint) -> Result<Self> {
        match endpoint {
            Endpoint::Path(path) => Listening::bind(&path).map(Socket::Listening),
            Endpoint::Inherited(fd) => Socket::take_over(fd),
        }
    }

    fn take_over(fd: OwnedFd) -> Result<Self> {
        let number = fd.as_raw_fd();
        let failed = |source| Error::Inherited { number, source };
        let unusable = |why| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
        let domain = sockopt::socket_domain(&fd).map_err(|error| failed(error.into()))?;
        let kind = sockopt::socket_type(&fd).map_err(|error| failed(error.into()))?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(unusable("it is not a Unix stream socket"));
        }
        if sockopt::socket_acceptconn(&fd).map_err(|error| failed(error.into()))? {
            let listener = UnixListener::from(fd);
            return Ok(Socket::Listening(Listening { listener, _created: None }));
        }
        let stream = UnixStream::from(fd);
        match stream.peer_addr() {
            // The parent may have used it without blocking; this process waits on it.
            Ok(_) => {
                stream.set_nonblocking(false).map(|()| Socket::Connected(stream)).map_err(failed)
            }
            Err(_) => Err(unusable("it neither listens nor is connected")),
        }
    }
}

impl Listening {
    /// Listens on `path`, replacing a stale socket.
    fn bind(path: &Path) -> Result<Self> {
        let failed = |source, advice| Error::Socket { path: path.to_path_buf(), source, advice };
        let in_use = |kind, why: &str| failed(io::Error::new(kind, why), "use another path");
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(in_use(io::ErrorKind::AlreadyExists, "it exists and is not a socket"));
            }
            Ok(_) => {
                // Connect with a socket of another type: a live listener does not notice.
                match UnixDatagram::unbound().and_then(|s| s.connect(path)) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        fs::remove_file(path)
                            .map_err(|error| failed(error, "remove the stale socket"))?;
                    }
                    Err(error) if error.raw_os_error() != Some(libc::EPROTOTYPE) => {
                        return Err(failed(error, "use another path"));
                    }
                    _ => {
                        return Err(in_use(
                            io::ErrorKind::AddrInUse,
                            "another process listens on it",
                        ));
                    }
                }
            }
            Err(_) => {}
        }
        let created = |error: io::Error| {
            let advice = advice_for_path(error.kind());
            failed(error, advice)
        };
        let listener = UnixListener::bind(path).map_err(created)?;
        let made = fs::symlink_metadata(path).map_err(created)?;
        let created = Created { path: path.to_path_buf(), id: (made.dev(), made.ino()) };
        Ok(Listening { listener, _created: Some(created) })
    }

    /// Returns the socket's name for messages.
    pub(crate) fn name(&self) -> String {
        match self.listener.local_addr().ok().as_ref().and_then(|addr| addr.as_pathname()) {
            Some(path) => path.display().to_string(),
            None => format!("descriptor {}", self.listener.as_raw_fd()),
        }
    }
}

/// Returns the remedy for a path at which no socket can be created.
fn advice_for_path(error: io::ErrorKind) -> &'static str {
    match error {
        io::ErrorKind::InvalidInput => "use a path of at most 107 bytes",
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            "use a path in an existing directory"
        }
        _ => "use a path in a directory where this user may create files",
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let socket = Listening::bind(&path).expect("a stale socket is replaced");
        let error = Listening::bind(&path).err().expect("a live one is not");
        assert!(error.to_string().contains("another process listens"), "{error}");
        drop(socket);
        assert!(!path.exists());

        fs::write(&path, "").unwrap();
        assert!(Listening::bind(&path).is_err());
        assert!(path.exists());
    }

    #[test]
    fn unusable_path_has_its_own_remedy() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        for (path, cause, remedy) in [
            ("absent/s", "No such file or directory", "in an existing directory"),
            ("file/s", "Not a directory", "in an existing directory"),
            (&"x".repeat(108), "SUN_LEN", "of at most 107 bytes"),
        ] {
            let error = Listening::bind(&dir.path().join(path)).err().expect("it is refused");
            let error = error.to_string();
            assert!(error.contains(cause) && error.ends_with(remedy), "{error}");
        }
        // Where no user may create files.
        let error = Listening::bind(Path::new("/proc/s")).err().expect("it is refused");
        let error = error.to_string();
        assert!(!error.contains("107 bytes"), "{error}");
    }

    #[test]
    fn inherited_descriptors_are_checked() {
        let open = |fd: OwnedFd| Socket::open(Endpoint::Inherited(fd));
        let (one, two) = UnixStream::pair().unwrap();
        assert!(matches!(open(one.into()), Ok(Socket::Connected(_))));
        // Its peer has gone, which the connection itself will show.
        assert!(matches!(open(two.into()), Ok(Socket::Connected(_)) | Err(_)));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = open(listener.into());
        assert!(matches!(&socket, Ok(Socket::Listening(it)) if it.name().ends_with("/s")));
        drop(socket);
        assert!(path.exists(), "the socket belongs to the process that created it");

        for (fd, words) in [
            (File::open("/dev/null").unwrap().into(), "Socket operation on non-socket"),
            (UnixDatagram::unbound().unwrap().into(), "not a Unix stream socket"),
        ] {
            let error = open(fd).err().expect("it is refused").to_string();
            assert!(error.contains("--fd ") && error.contains(words), "{error}");
        }
    }
}
