// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A web server for a store, which knows its readers by the first part of their URLs, and can leave
//! the requests of one of them unanswered.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A request for a chunk: the reader, and the object with its range.
pub(crate) type Fetched = (String, String);

struct Shared {
    folder: PathBuf,
    /// The time that each answer takes.
    delay: Duration,
    /// The reader whose requests for chunks are not answered after the first ones, and their number.
    silent: Option<(String, usize)>,
    fetched: Mutex<Vec<Fetched>>,
}

/// A server, which serves until the process ends.
pub(crate) struct Server {
    shared: Arc<Shared>,
    port: u16,
}

impl Server {
    pub(crate) fn start(folder: &Path, delay: Duration, silent: Option<(&str, usize)>) -> Server {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let silent = silent.map(|(reader, after)| (reader.to_owned(), after));
        let (folder, fetched) = (folder.to_owned(), Mutex::default());
        let shared = Arc::new(Shared { folder, delay, silent, fetched });
        let serving = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let shared = serving.clone();
                thread::spawn(move || serve(&shared, connection));
            }
        });
        Server { shared, port }
    }

    /// Returns the URL of the store for a reader.
    pub(crate) fn url(&self, reader: &str) -> String {
        format!("http://127.0.0.1:{}/{reader}", self.port)
    }

    /// Returns the requests for chunks so far.
    pub(crate) fn fetched(&self) -> Vec<Fetched> {
        self.shared.fetched.lock().unwrap().clone()
    }
}

/// Serves the requests of a connection; returns when it breaks.
fn serve(shared: &Shared, connection: TcpStream) -> Option<()> {
    let mut answers = connection.try_clone().ok()?;
    let mut lines = BufReader::new(connection).lines();
    loop {
        let first = lines.next()?.ok()?;
        let mut range = None;
        loop {
            let line = lines.next()?.ok()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
        }
        let path = first.split(' ').nth(1)?.trim_start_matches('/');
        let (reader, object) = path.split_once('/')?;
        let range = range.unwrap_or_default();
        if object.starts_with("packs/") {
            let mut fetched = shared.fetched.lock().unwrap();
            let request = (reader.to_owned(), format!("{object} {range}"));
            let own = fetched.iter().filter(|(by, _)| by == reader).count();
            let silent =
                shared.silent.as_ref().is_some_and(|(by, after)| by == reader && own >= *after);
            // A client asks again after a while without an answer.
            if !silent || !fetched.contains(&request) {
                fetched.push(request);
            }
            drop(fetched);
            if silent {
                thread::sleep(Duration::from_secs(3600));
            }
        }
        thread::sleep(shared.delay);
        let Ok(content) = fs::read(shared.folder.join(object)) else {
            answers.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").ok()?;
            continue;
        };
        let len = content.len();
        let head = match range.split_once('-') {
            Some((start, end)) => {
                let (start, end): (usize, usize) = (start.parse().ok()?, end.parse().ok()?);
                let end = end.min(len - 1);
                let head = format!(
                    "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end}/{len}\r\n"
                );
                answers.write_all(head.as_bytes()).ok()?;
                &content[start..=end]
            }
            None => {
                answers.write_all(b"HTTP/1.1 200 OK\r\n").ok()?;
                &content[..]
            }
        };
        let lengths = format!("Content-Length: {}\r\nETag: \"{len}\"\r\n\r\n", head.len());
        answers.write_all(lengths.as_bytes()).ok()?;
        answers.write_all(head).ok()?;
    }
}
