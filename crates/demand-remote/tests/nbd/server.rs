// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! NBD servers on Unix sockets, their images, and reads with checks of each byte.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use demand_remote::nbd::{Location, NbdError, NbdOptions, NbdSource};
use demand_source::{
    Chunk, Completion, Destination, OwnedBytes, PageSource, Priority, Request, Retry,
};
use tempfile::TempDir;
use test_support::wait::{PATIENCE, until};

/// A running server, which ends with this value.
pub(crate) struct Server {
    child: Child,
    command: Vec<String>,
    socket: PathBuf,
    _folder: TempDir,
}

impl Server {
    /// Starts nbdkit with these arguments. Returns `None` if it is not installed.
    pub(crate) fn nbdkit(arguments: &[&str]) -> Option<Server> {
        let command = ["nbdkit", "--foreground", "--unix", "SOCKET", "--threads", "64"];
        Server::start(&[&command, arguments].concat())
    }

    /// Starts qemu-nbd with an image. Returns `None` if it is not installed.
    pub(crate) fn qemu(image: &Path, arguments: &[&str]) -> Option<Server> {
        let image = image.to_str().unwrap();
        let command = ["qemu-nbd", "--read-only", "--persistent", "--socket", "SOCKET"];
        Server::start(&[&command, arguments, &[image]].concat())
    }

    fn start(command: &[&str]) -> Option<Server> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let in_place = |word: &&str| match *word {
            "SOCKET" => socket.display().to_string(),
            word => word.to_owned(),
        };
        let command: Vec<String> = command.iter().map(in_place).collect();
        let child = spawn(&command)?;
        let server = Server { child, command, socket, _folder: folder };
        server.wait();
        Some(server)
    }

    fn wait(&self) {
        until("the server listens", || UnixStream::connect(&self.socket).is_ok());
    }

    /// Kills the server.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the killed server again, with `to` in place of the argument `from`.
    pub(crate) fn restart(&mut self, from: &str, to: &str) {
        let command: Vec<_> = self.command.iter().map(|word| word.replace(from, to)).collect();
        let _ = std::fs::remove_file(&self.socket);
        self.child = spawn(&command).unwrap();
        self.wait();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// Returns the URL of an export, with more parameters.
    pub(crate) fn url(&self, scheme: &str, export: &str, parameters: &str) -> String {
        format!("{scheme}+unix:///{export}?socket={}{parameters}", self.socket.display())
    }

    /// Opens the default export.
    pub(crate) fn open(&self, options: NbdOptions) -> NbdSource {
        open(&self.url("nbd", "", ""), options).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &[String]) -> Option<Child> {
    let started = Command::new(&command[0]).args(&command[1..]).stderr(Stdio::null()).spawn();
    match started {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("SKIPPED: {} is not installed", command[0]);
            None
        }
        started => Some(started.unwrap()),
    }
}

/// Runs a program to its end. Returns `None` if it is not installed.
pub(crate) fn run(program: &str, arguments: &[impl AsRef<OsStr>]) -> Option<()> {
    let output = Command::new(program).args(arguments).output();
    match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("SKIPPED: {program} is not installed");
            None
        }
        output => {
            let output = output.unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{program}: {said}");
            Some(())
        }
    }
}

pub(crate) fn open(url: &str, options: NbdOptions) -> Result<NbdSource, NbdError> {
    NbdSource::open(&url.parse::<Location>().unwrap(), options)
}

/// Options with short limits.
pub(crate) fn hasty() -> NbdOptions {
    NbdOptions {
        connect: Duration::from_secs(5),
        answer: Duration::from_secs(5),
        pause: Duration::from_millis(20),
        longest_pause: Duration::from_millis(200),
        ..NbdOptions::default()
    }
}

/// Submits a read.
pub(crate) fn submit(
    source: &NbdSource,
    priority: Priority,
    offset: u64,
    len: usize,
) -> (Completion, OwnedBytes) {
    let (destination, bytes) = Destination::owned(vec![0xee; len]);
    let chunks = vec![Chunk { offset, destination }];
    (source.submit(Request { priority, chunks }), bytes)
}

/// Reads, as often as it takes. Returns the bytes, and the number of failures.
pub(crate) fn read(
    source: &NbdSource,
    priority: Priority,
    offset: u64,
    len: usize,
) -> (Vec<u8>, u32) {
    let begun = Instant::now();
    let mut failures = 0;
    loop {
        let (completion, bytes) = submit(source, priority, offset, len);
        match completion.wait() {
            Ok(()) => return (bytes.take().unwrap(), failures),
            Err(error) => assert_eq!(error.retry(), Retry::Later, "{error}"),
        }
        assert!(begun.elapsed() < PATIENCE, "a read succeeds");
        failures += 1;
        thread::sleep(Duration::from_millis(10));
    }
}

/// Returns what nbdkit's plugin `pattern` has at an offset.
pub(crate) fn pattern(offset: u64, len: usize) -> Vec<u8> {
    let first = offset & !7;
    let words = (first..offset + len as u64).step_by(8);
    let bytes: Vec<u8> = words.flat_map(u64::to_be_bytes).collect();
    bytes[usize::try_from(offset - first).unwrap()..][..len].to_vec()
}

/// A repeatable sequence of numbers, which look random.
pub(crate) fn scrambled(number: u64) -> u64 {
    let mut x = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 31;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// Writes an image with blocks of 64 KiB of which about half are holes. Returns its content.
pub(crate) fn write_image(path: &Path, blocks: u64) -> Vec<u8> {
    const BLOCK: u64 = 64 << 10;
    let file = File::create(path).unwrap();
    file.set_len(blocks * BLOCK).unwrap();
    let mut content = vec![0; usize::try_from(blocks * BLOCK).unwrap()];
    for block in (0..blocks).filter(|block| scrambled(block / 3).is_multiple_of(2)) {
        let at = usize::try_from(block * BLOCK).unwrap();
        let bytes = &mut content[at..][..BLOCK as usize];
        for (word, chunk) in bytes.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&scrambled(block << 32 | word as u64).to_le_bytes());
        }
        file.write_all_at(bytes, block * BLOCK).unwrap();
    }
    content
}
