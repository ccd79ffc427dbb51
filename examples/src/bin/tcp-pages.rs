// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves an image over TCP, or reads one from such a server, to try the source of
//! `demand_examples::tcp` by hand.
//!
//! ```sh
//! tcp-pages serve memory.img --listen 127.0.0.1:7777 &
//! tcp-pages read 127.0.0.1:7777 copy.img
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Parser, Subcommand};
use demand_examples::tcp::{TcpOptions, TcpSource, serve};
use demand_examples::{Result, options};
use demand_source::{
    Chunk, Destination, LocalFile, PageSource, Priority, Request, SourceError, to_usize,
};

/// Bytes of one request of `read`.
const STEP: u64 = 64 << 10;
/// Most requests of `read` at a time.
const AHEAD: usize = 32;

/// Serves images over TCP, and reads them.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve an image until killed
    Serve {
        /// A raw image, of any length
        image: PathBuf,
        /// Address to listen on; port 0 is any free one
        #[arg(long, default_value = "127.0.0.1:7777")]
        listen: String,
    },
    /// Copy a served image to a new file
    Read {
        /// Address of the server
        address: String,
        /// The new file
        copy: PathBuf,
    },
}

fn main() -> ExitCode {
    options::run("tcp-pages", |Options { command }| match command {
        Command::Serve { image, listen } => serve_image(image, listen),
        Command::Read { address, copy } => read(address, copy),
    })
}

fn serve_image(image: &Path, listen: &str) -> Result<()> {
    let source: Arc<dyn PageSource> = Arc::new(LocalFile::open(image)?);
    // It stands for the content: a real server would use a hash, or its snapshot's identifier.
    let metadata = std::fs::metadata(image)?;
    let mut id = [0; 16];
    id[..8].copy_from_slice(&metadata.ino().to_le_bytes());
    id[8..].copy_from_slice(&metadata.mtime_nsec().wrapping_add(metadata.mtime()).to_le_bytes());
    let listener = TcpListener::bind(listen)
        .map_err(|error| format!("cannot listen on {listen}: {error}; choose another address"))?;
    println!("serving {} bytes at {}", source.size(), listener.local_addr()?);
    io::stdout().flush()?;
    Ok(serve(&listener, &source, id)?)
}

fn read(address: &str, copy: &Path) -> Result<()> {
    let source = TcpSource::connect(address, TcpOptions::default())?;
    let (begun, size) = (Instant::now(), source.size());
    let mut file = File::create_new(copy)
        .map_err(|error| format!("cannot create {}: {error}", copy.display()))?;
    // Several requests at a time, so that the distance is paid once and not for each.
    let (mut in_flight, mut next) = (VecDeque::new(), 0);
    while next < size || !in_flight.is_empty() {
        if next < size && in_flight.len() < AHEAD {
            let len = STEP.min(size - next);
            let (destination, bytes) = Destination::owned(vec![0; to_usize(len)]);
            let chunks = vec![Chunk { offset: next, destination }];
            let completion = source.submit(Request { priority: Priority::Demand, chunks });
            in_flight.push_back((completion, bytes));
            next += len;
        } else if let Some((completion, bytes)) = in_flight.pop_front() {
            completion.wait()?;
            let bytes: std::result::Result<Vec<u8>, SourceError> = bytes.take();
            file.write_all(&bytes?)?;
        }
    }
    println!("read {size} bytes in {} ms", begun.elapsed().as_millis());
    Ok(())
}
