// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user back-end that does one thing wrong, to test how a front-end reacts.
//!
//! `malicious --socket PATH --deed NAME` serves one connection and exits with it: with status 0, or
//! with 4 if memory next to its mappings of guest memory has changed. `malicious --list` prints the
//! deeds.

mod deed;
mod hostile;
mod memory;

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use deed::Deed;
use hostile::{ALL_FEATURES, Connection};

const USAGE: &str = "usage: malicious --socket PATH --deed NAME, or --list";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["--list"] => Ok(list()),
        ["--socket", socket, "--deed", deed] => deed.parse().and_then(|deed| serve(socket, deed)),
        _ => Err(USAGE.into()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("malicious: {error}");
        ExitCode::from(2)
    })
}

fn list() -> ExitCode {
    for deed in Deed::all() {
        match writeln!(std::io::stdout(), "{deed}") {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            result => result.expect("standard output can be written"),
        }
    }
    ExitCode::SUCCESS
}

fn serve(socket: &str, deed: Deed) -> Result<ExitCode, String> {
    let listener =
        UnixListener::bind(socket).map_err(|error| format!("listen on {socket}: {error}"))?;
    let (stream, _) = listener.accept().map_err(|error| format!("accept: {error}"))?;
    let mut connection = Connection::new(stream, deed, ALL_FEATURES);
    connection.serve();
    let intact = connection.mappings().lock().unwrap().iter().all(|mapping| mapping.is_intact());
    // Exits without running destructors: threads that wait for a page end with the process.
    std::process::exit(if intact { 0 } else { 4 })
}
