// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory whose pages come over TCP: from a real server that is slow, dies, hangs or comes back
//! with another image, and from servers that break the protocol.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_examples::tcp::{Answer, Hello, Query, Status, TcpOptions, TcpSource, serve};
use demand_memory::{
    BackingKind, FaultPath, FetchError, Fill, FillRate, MemfdBacking, PAGE_SIZE, PageRange, Pager,
    PagerConfig, Retrier, RetryPolicy, Waiter,
};
use demand_source::{
    BlockingSource, Chunk, Destination, Extent, PageSource, Priority, Request, Retry, SourceError,
    Threaded,
};
use test_support::host::threads_of;
use test_support::image::page_of;
use test_support::wait::{PATIENCE, until};

const PAGES: u64 = 256;
/// Bytes of the image, which ends within a page.
const SIZE: usize = (PAGES * PAGE_SIZE) as usize - 777;

fn options() -> TcpOptions {
    TcpOptions { answer: Duration::from_secs(1), ..TcpOptions::default() }
}

static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut content: Vec<u8> = (0..PAGES).flat_map(page_of).collect();
    content.truncate(SIZE);
    content
});

fn content() -> &'static [u8] {
    &CONTENT
}

/// A server process, which is killed when it is dropped.
struct Server(Child, String);

impl Server {
    fn start(image: &Path, listen: &str) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tcp-pages"));
        command.arg("serve").arg(image).args(["--listen", listen]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap().to_owned();
        assert!(line.starts_with(&format!("serving {SIZE} bytes at 127.0.0.1:")), "{line}");
        Server(child, address)
    }
    fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.0.id()).unwrap();
        // SAFETY: the process is a child that has not been waited for, so the number is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Reports = Arc<Mutex<Vec<(String, Retry)>>>;

/// Memory filled from a server.
struct Memory {
    pager: Arc<Pager>,
    retrier: Retrier,
    reports: Reports,
}

impl Memory {
    fn of(address: &str) -> Memory {
        let source = TcpSource::connect(address, options()).unwrap();
        let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
        let reports = Reports::default();
        let policy = RetryPolicy { longest: Duration::from_millis(100), ..RetryPolicy::default() };
        let retrier = Retrier::new(policy, {
            let reports = reports.clone();
            move |failure| {
                reports.lock().unwrap().push((failure.error.to_string(), failure.retry));
            }
        });
        let config = PagerConfig {
            retrier: retrier.clone(),
            ..PagerConfig::new(Arc::new(backing), Arc::new(source))
        };
        Memory { pager: Pager::new(config).unwrap(), retrier, reports }
    }

    /// Waits for a page on a thread, as a vCPU does.
    fn touch(&self, page: u64) -> Receiver<Result<(), FetchError>> {
        let (sender, receiver) = mpsc::channel();
        let pager = self.pager.clone();
        let page = PageRange::page(page);
        thread::spawn(move || sender.send(pager.ensure(page, FaultPath::Guest, &Waiter::new())));
        receiver
    }

    fn reported(&self, words: &str) -> bool {
        self.reports.lock().unwrap().iter().any(|(report, _)| report.contains(words))
    }

    /// Checks the content of the whole memory, all of which must be present.
    fn check(&self) {
        let mut expected = content().to_vec();
        expected.resize((PAGES * PAGE_SIZE) as usize, 0);
        let file = self.pager.backing().file().unwrap();
        let mut found = vec![0xee; expected.len()];
        std::os::unix::fs::FileExt::read_exact_at(&**file, &mut found, 0).unwrap();
        assert!(found == expected);
    }

    fn fill(&self) {
        let fill = Fill::start(vec![self.pager.clone()], FillRate::Unlimited).unwrap();
        until("all pages arrive", || self.pager.bitmap().is_complete());
        drop(fill);
        self.check();
    }
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content()).unwrap();
    file
}

#[test]
fn pages_arrive_and_commands_copy_an_image() {
    let image = image();
    let server = Server::start(image.path(), "127.0.0.1:0");
    let memory = Memory::of(&server.1);
    assert_eq!(memory.touch(7).recv_timeout(PATIENCE).unwrap(), Ok(()));
    memory.fill();
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.img");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tcp-pages"));
    let read = command.arg("read").arg(&server.1).arg(&copy).output().unwrap();
    assert!(read.status.success(), "{read:?}");
    assert!(std::fs::read(copy).unwrap() == content());
}

#[test]
fn killed_server_comes_back() {
    let image = image();
    let server = Server::start(image.path(), "127.0.0.1:0");
    let memory = Memory::of(&server.1);
    assert_eq!(memory.touch(1).recv_timeout(PATIENCE).unwrap(), Ok(()));
    let address = server.1.clone();
    drop(server);
    let vcpu = memory.touch(2);
    until("the failure is reported", || memory.reported("start the page server there"));
    assert!(memory.pager.bitmap().is_missing(2) && vcpu.try_recv().is_err());
    let _server = Server::start(image.path(), &address);
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    memory.fill();
}

#[test]
fn hanging_server_is_reported() {
    let image = image();
    let server = Server::start(image.path(), "127.0.0.1:0");
    let memory = Memory::of(&server.1);
    assert_eq!(memory.touch(1).recv_timeout(PATIENCE).unwrap(), Ok(()));
    server.signal(libc::SIGSTOP);
    // Until the signal is delivered, the server answers.
    until("the server has stopped", || {
        threads_of(server.0.id()).split(", ").all(|thread| thread.contains(" T in "))
    });
    let vcpu = memory.touch(2);
    // First by the connection that exists, then by new ones, which the kernel still accepts.
    until("the failure is reported", || memory.reported("has not answered for"));
    until("it is asked again", || memory.reports.lock().unwrap().len() > 2);
    assert!(memory.pager.bitmap().is_missing(2) && vcpu.try_recv().is_err());
    server.signal(libc::SIGCONT);
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    memory.fill();
}

#[test]
fn other_image_is_refused_until_the_first_returns() {
    let (first, other) = (image(), image());
    let server = Server::start(first.path(), "127.0.0.1:0");
    let memory = Memory::of(&server.1);
    let address = server.1.clone();
    drop(server);
    let server = Server::start(other.path(), &address);
    let vcpu = memory.touch(2);
    until("it is refused", || memory.reported("now serves another image"));
    let never = |memory: &Memory| {
        let reports = memory.reports.lock().unwrap();
        reports.iter().filter(|(_, retry)| *retry == Retry::Never).count()
    };
    let refusals = never(&memory);
    drop(server);
    let _server = Server::start(first.path(), &address);
    thread::sleep(Duration::from_millis(500));
    assert!(memory.pager.bitmap().is_missing(2), "it is not asked again by itself");
    assert_eq!(never(&memory), refusals);
    // As a VMM does when its user resumes it.
    memory.retrier.retry_now();
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    memory.fill();
}

/// A source that takes its time for each read.
struct Distant;

/// Long in comparison with what a busy machine adds.
const ROUND_TRIP: Duration = Duration::from_millis(200);

impl BlockingSource for Distant {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: SIZE as u64 })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        thread::sleep(ROUND_TRIP);
        to.write_at(0, &content()[usize::try_from(offset).unwrap()..][..to.len()]);
        Ok(())
    }
}

#[test]
fn faults_do_not_wait_for_each_other() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let distant: Arc<dyn PageSource> = Arc::new(Threaded::new(Distant, 128).unwrap());
    thread::spawn(move || serve(&listener, &distant, [1; 16]));
    let memory = Memory::of(&address);
    let begun = Instant::now();
    for page in 0..64 {
        memory.pager.fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    let first = PageRange::new(0, 64);
    memory.pager.ensure(first, FaultPath::Guest, &Waiter::new()).unwrap();
    let took = begun.elapsed();
    // One by one they would take 64 round trips.
    assert!(took < 16 * ROUND_TRIP, "{took:?}");
    memory.fill();
}

/// Starts a server that greets as it should, and leaves each answer to `answer`, which gets the
/// number of the query.
fn misbehaving(answer: fn(usize, Query, &mut TcpStream) -> std::io::Result<()>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, asked) = (stream.unwrap(), asked.clone());
            thread::spawn(move || -> std::io::Result<()> {
                let hello = Hello { size: SIZE as u64, image: [1; 16] };
                stream.write_all(&hello.encode())?;
                loop {
                    let mut query = [0; Query::BYTES];
                    stream.read_exact(&mut query)?;
                    let number = asked.fetch_add(1, Ordering::Relaxed);
                    answer(number, Query::decode(&query), &mut stream)?;
                }
            });
        }
    });
    address
}

fn right(query: Query, stream: &mut TcpStream) -> std::io::Result<()> {
    let Query { tag, offset, len } = query;
    stream.write_all(&Answer { tag, status: Status::Bytes, len }.encode())?;
    stream.write_all(&content()[usize::try_from(offset).unwrap()..][..len as usize])
}

/// The page arrives after failures that are reported with these words.
#[track_caller]
fn recovers(answer: fn(usize, Query, &mut TcpStream) -> std::io::Result<()>, words: &str) {
    let memory = Memory::of(&misbehaving(answer));
    let vcpu = memory.touch(2);
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    let reports = memory.reports.lock().unwrap().clone();
    assert!(memory.reported(words), "{reports:?}");
    assert!(reports.iter().all(|(report, _)| !report.contains('\n')), "{reports:?}");
    memory.fill();
}

#[test]
fn short_answers_are_no_zeros() {
    recovers(
        |number, query, stream| {
            if number >= 3 {
                return right(query, stream);
            }
            let head = Answer { tag: query.tag, status: Status::Bytes, len: 1000 };
            stream.write_all(&head.encode())?;
            stream.write_all(&[7; 1000])
        },
        "it wrote only 1000 and reported success",
    );
}

#[test]
fn connection_cut_within_an_answer_is_no_page() {
    recovers(
        |number, query, stream| {
            if number >= 3 {
                return right(query, stream);
            }
            let head = Answer { tag: query.tag, status: Status::Bytes, len: query.len };
            stream.write_all(&head.encode())?;
            stream.write_all(&[7; 1000])?;
            stream.shutdown(std::net::Shutdown::Both)
        },
        "lost the connection",
    );
}

#[test]
fn answers_longer_than_their_queries_reach_no_memory() {
    recovers(
        |number, query, stream| {
            if number >= 3 {
                return right(query, stream);
            }
            let head = Answer { tag: query.tag, status: Status::Bytes, len: query.len + 1 };
            stream.write_all(&head.encode())?;
            stream.write_all(&vec![7; query.len as usize + 1])
        },
        "more bytes than it was asked for",
    );
}

#[test]
fn unanswered_query_fails_while_others_succeed() {
    recovers(
        |number, query, stream| if number == 0 { Ok(()) } else { right(query, stream) },
        "has not answered for",
    );
}

#[test]
fn servers_errors_are_reported() {
    recovers(
        |number, query, stream| match number {
            0 => {
                let head = Answer { tag: query.tag, status: Status::Later, len: 0 };
                stream.write_all(&head.encode())
            }
            _ => right(query, stream),
        },
        "cannot read its image at offset 8192",
    );
}

#[test]
fn large_request_is_read_in_parts() {
    let image = image();
    let server = Server::start(image.path(), "127.0.0.1:0");
    let source = TcpSource::connect(&server.1, options()).unwrap();
    let (destination, bytes) = Destination::owned(vec![0xee; SIZE]);
    let chunks = vec![Chunk { offset: 0, destination }];
    source.submit(Request { priority: Priority::Fill, chunks }).wait().unwrap();
    assert!(bytes.take().unwrap() == content());
}

#[test]
fn dropped_source_answers_its_requests() {
    let address = misbehaving(|_, _, _| Ok(()));
    let source = TcpSource::connect(&address, TcpOptions::default()).unwrap();
    let requests: Vec<_> = [Priority::Demand, Priority::Fill]
        .into_iter()
        .flat_map(|priority| (0..100).map(move |page| (priority, page * PAGE_SIZE)))
        .map(|(priority, offset)| {
            let (destination, _) = Destination::owned(vec![0; 4096]);
            source.submit(Request { priority, chunks: vec![Chunk { offset, destination }] })
        })
        .collect();
    let begun = Instant::now();
    drop(source);
    for request in requests {
        let outcome = request.wait();
        assert!(matches!(outcome, Err(SourceError::Abandoned)), "{outcome:?}");
    }
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn absent_server_is_one_clear_line() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tcp-pages"));
    let read = command.args(["read", &address, "/nowhere/copy.img"]).output().unwrap();
    assert!(!read.status.success());
    let error = String::from_utf8(read.stderr).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(&format!("cannot connect to {address}")), "{error}");
}

/// Each test that the guide names is one of these.
#[test]
fn guide_names_existing_tests() {
    let guide = include_str!("../../crates/demand-source/docs/writing-a-source.md");
    let (_, table) = guide.split_once("shown by (`examples/tests/tcp.rs`)").unwrap();
    let names: Vec<_> =
        table.split('`').skip(1).step_by(2).filter(|name| name.contains('_')).collect();
    assert!(names.len() > 8, "{names:?}");
    for name in names {
        assert!(include_str!("tcp.rs").contains(&format!("#[test]\nfn {name}()")), "{name}");
    }
}
