// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `NbdSource`, the source of pages behind an export.

use std::fmt;
use std::sync::Arc;

use demand_source::{Completion, Extent, PageSource, Priority, Request, SourceError};

use super::connection::Connection;
use super::error::NbdError;
use super::extents::Extents;
use super::flight::Work;
use super::location::Location;
use super::options::NbdOptions;
use super::piece::{Geometry, Piece};
use super::queue::Shared;
use super::stream;
use crate::runtime;

/// An export of an NBD server, as a source of pages.
///
/// Demand and background fill have connections of their own, each with many requests in flight, so
/// demand does not wait behind fill. While one of the two has no connection, as with a server that
/// allows only one, the other serves both.
///
/// A connection that breaks, or whose server does not answer, fails its requests, and is made again
/// after growing pauses. The export must then have the same size as before.
///
/// Runs of zeros that the server knows are [holes](Extent::Hole). They are looked up in the
/// background, ahead of the reads.
///
/// Dropping it answers the requests that are left with [`SourceError::Abandoned`], and does not
/// wait.
///
/// # Examples
///
/// ```
/// use demand_remote::nbd::{Location, NbdOptions, NbdSource};
/// use demand_source::{Destination, PageSource};
///
/// # use std::process::{Command, Stdio};
/// # let folder = tempfile::tempdir().unwrap();
/// # let socket = folder.path().join("nbd.sock");
/// # let server = Command::new("nbdkit").arg("--foreground").arg("--unix").arg(&socket)
/// #     .args(["pattern", "64M"]).stderr(Stdio::null()).spawn();
/// # let Ok(mut server) = server else { return println!("SKIPPED: nbdkit is not installed") };
/// # for _ in 0..1000 {
/// #     if std::os::unix::net::UnixStream::connect(&socket).is_ok() { break }
/// #     std::thread::sleep(std::time::Duration::from_millis(10));
/// # }
/// # let socket = socket.display();
/// // The server: nbdkit --unix SOCKET pattern 64M
/// let location: Location = format!("nbd+unix:///?socket={socket}").parse().unwrap();
/// let source = NbdSource::open(&location, NbdOptions::default()).unwrap();
/// assert_eq!(source.size(), 64 << 20);
///
/// let mut page = [0; 4096];
/// source.read_through(8192, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page[..8], 8192u64.to_be_bytes());
/// # drop(source);
/// # server.kill().unwrap();
/// # server.wait().unwrap();
/// ```
pub struct NbdSource {
    shared: Arc<Shared>,
    extents: Arc<Extents>,
}

impl NbdSource {
    /// Connects to a server, and opens the export. Waits for it at most as long as the options say.
    /// It must not be called by a thread of an asynchronous runtime.
    ///
    /// # Errors
    ///
    /// [`NbdError`], at the first failure: it is not repeated.
    pub fn open(location: &Location, options: NbdOptions) -> Result<Self, NbdError> {
        let name = location.to_string();
        let first = runtime::wait(stream::connect(location, &options))
            .map_err(|kind| NbdError::new(&name, kind))?;
        let export = first.export;
        let [demand, fill] = options.connections(export.several);
        let shared = Shared::new(name, Geometry::new(&export), demand + fill);
        let knows_zeros = first.mode.allocation.is_some();
        let extents = Arc::new(Extents::new(export.size, export.blocks.least, knows_zeros));
        let (mut first, options) = (Some(first), Arc::new(options));
        for index in 0..demand + fill {
            let connection = Connection {
                shared: shared.clone(),
                location: location.clone(),
                options: options.clone(),
                priority: if index < demand { Priority::Demand } else { Priority::Fill },
                index,
            };
            runtime::handle().spawn(connection.run(first.take()));
        }
        let source = NbdSource { shared, extents };
        source.look_ahead(0);
        Ok(source)
    }

    /// Starts the look-up of extents that is due when bytes at an offset are read.
    fn look_ahead(&self, offset: u64) {
        self.shared.look_up(self.extents.look_ahead(offset));
    }
}

impl PageSource for NbdSource {
    fn size(&self) -> u64 {
        self.shared.geometry.size
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        loop {
            if let Some(extent) = self.extents.known(offset) {
                return Ok(extent);
            }
            let (query, completion) = self.extents.ask(offset);
            self.shared.look_up(query);
            completion.wait()?;
        }
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        self.look_ahead(offset);
        self.extents.known(offset).map(Ok)
    }

    fn submit(&self, request: Request) -> Completion {
        let size = self.size();
        for chunk in &request.chunks {
            let (offset, len) = (chunk.offset, chunk.destination.len() as u64);
            if offset.checked_add(len).is_none_or(|end| end > size) {
                let image = self.shared.export.clone();
                let error = SourceError::OutOfRange { image, offset, len, size };
                drop(request);
                return Completion::ready(Err(error));
            }
        }
        if let Some(chunk) = request.chunks.first() {
            self.look_ahead(chunk.offset);
        }
        let priority = request.priority;
        let (pieces, completion) = Piece::all_of(request, &self.shared.geometry);
        self.shared.push(priority, pieces.into_iter().map(Work::Read).collect());
        completion
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.raise(offset, len);
    }
}

impl Drop for NbdSource {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl fmt::Debug for NbdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdSource")
            .field("export", &self.shared.export)
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}
