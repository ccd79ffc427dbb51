// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pagers that break the protocol: one clear error, and never wrong bytes.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use demand_pager::PagerOptions;
use demand_pager::protocol::{Fault, Greeting, LONGEST_TEXT, MOST, Reply};
use demand_source::{Priority, Retry};
use rustix::fs::{MemfdFlags, memfd_create};
use test_support::wait::until;

use crate::fake::{Fake, SIZE, fault, greet, greeting, sevens};
use crate::support::{read, submit};

/// Size of the staging area, in bytes.
const STAGING: u64 = 8192;

fn staging() -> File {
    let staging = File::from(memfd_create("staging", MemfdFlags::CLOEXEC).unwrap());
    staging.set_len(STAGING).unwrap();
    staging
}

/// A frame with this header and body.
fn frame(command: u16, len: u64, body: &[u8]) -> Vec<u8> {
    [&command.to_le_bytes()[..], &[0; 6], &len.to_le_bytes(), body].concat()
}

fn body(tag: u64, rest: usize) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &vec![0x55; rest]].concat()
}

type Answer = fn(Fault) -> Vec<u8>;

/// Messages in place of an answer, each with the words of its error. The first connection sends it;
/// the next one answers.
const ANSWERS: [(&str, Answer); 14] = [
    ("no such tag", |fault| Reply::Zero { tag: fault.tag + 1 }.encode()),
    ("no such tag", |fault| Reply::Data { tag: 0, bytes: vec![9; fault.len as usize] }.encode()),
    ("no such tag", |_| Reply::Error { tag: 0, retry: Retry::Later, text: "x".into() }.encode()),
    ("another number of bytes", |fault| Reply::Data { tag: fault.tag, bytes: vec![9] }.encode()),
    ("another number of bytes", |fault| {
        Reply::Data { tag: fault.tag, bytes: vec![9; fault.len as usize + 1] }.encode()
    }),
    ("another number of bytes", |fault| Reply::Data { tag: fault.tag, bytes: vec![] }.encode()),
    ("outside its staging area", |fault| {
        Reply::Staged { tag: fault.tag, offset: STAGING - 4095 }.encode()
    }),
    ("outside its staging area", |fault| {
        Reply::Staged { tag: fault.tag, offset: u64::MAX }.encode()
    }),
    ("too long", |fault| frame(0x28, MOST as u64 + 9, &body(fault.tag, 4096))),
    ("too long", |fault| frame(0x28, u64::MAX, &body(fault.tag, 4096))),
    ("too short", |fault| frame(0x29, 15, &body(fault.tag, 7))),
    ("wrong length", |fault| frame(0x2a, 4104, &body(fault.tag, 4096))),
    ("wrong length", |fault| frame(0x2b, 17 + LONGEST_TEXT as u64, &body(fault.tag, 4096))),
    ("unknown kind", |fault| frame(0x2c, 8, &body(fault.tag, 0))),
];

#[test]
fn nonsense_is_one_error_and_no_bytes() {
    for (words, answer) in ANSWERS {
        let nonsense = move |stream: &mut UnixStream| {
            greet(stream, Greeting { staging: Some(STAGING), ..greeting() }, &[&staging()])?;
            let asked = fault(stream)?;
            stream.write_all(&answer(asked))?;
            fault(stream).map(drop)
        };
        fails_once(words, nonsense);
    }
    let second_handshake = |stream: &mut UnixStream| {
        greet(stream, greeting(), &[])?;
        fault(stream)?;
        greet(stream, greeting(), &[])?;
        fault(stream).map(drop)
    };
    fails_once("second handshake", second_handshake);
    let no_staging = |stream: &mut UnixStream| {
        greet(stream, greeting(), &[])?;
        let tag = fault(stream)?.tag;
        stream.write_all(&Reply::Staged { tag, offset: 0 }.encode())?;
        fault(stream).map(drop)
    };
    fails_once("a staging area, and has none", no_staging);
    let shrunk = |stream: &mut UnixStream| {
        let staging = staging();
        greet(stream, Greeting { staging: Some(STAGING), ..greeting() }, &[&staging])?;
        let tag = fault(stream)?.tag;
        staging.set_len(4096)?;
        stream.write_all(&Reply::Staged { tag, offset: 4096 }.encode())?;
        fault(stream).map(drop)
    };
    fails_once("has shrunk", shrunk);
}

/// The pager's first connection breaks the protocol with these words, and the next ones answer.
fn fails_once(
    words: &str,
    nonsense: impl Fn(&mut UnixStream) -> std::io::Result<()> + Clone + Send + 'static,
) {
    let connections = Arc::new(AtomicUsize::new(0));
    let fake = Fake::start(move |stream| {
        if connections.fetch_add(1, Ordering::SeqCst) == 0 {
            return nonsense(stream);
        }
        greet(stream, greeting(), &[])?;
        loop {
            let fault = fault(stream)?;
            sevens(stream, fault)?;
        }
    });
    let source = fake.open(PagerOptions::default()).unwrap();
    let (completion, bytes) = submit(&source, Priority::Demand, 4096, 4096);
    let error = completion.wait().unwrap_err();
    assert!(bytes.take().is_err(), "{words}");
    let text = error.to_string();
    assert!(text.contains("the pager broke the protocol: ") && text.contains(words), "{text}");
    assert_eq!(error.retry(), Retry::Later, "{text}");
    // The next connection is used as any other.
    assert_eq!(read(&source, Priority::Demand, 4096, 4096), [7; 4096]);
    assert_eq!(fake.connections(), 2, "{words}");
}

#[test]
fn answer_that_ends_early_is_no_zeros() {
    let fake = Fake::start(|stream| {
        greet(stream, greeting(), &[])?;
        let asked = fault(stream)?;
        let answer = Reply::Data { tag: asked.tag, bytes: vec![9; asked.len as usize] }.encode();
        // Half of the bytes, then the end of the connection; later connections end at once.
        stream.write_all(&answer[..answer.len() / 2])
    });
    let source = fake.open(PagerOptions::default()).unwrap();
    let (completion, bytes) = submit(&source, Priority::Demand, 0, 8192);
    until("several connections were made", || fake.connections() > 3);
    drop(source);
    completion.wait().unwrap_err();
    assert!(bytes.take().is_err());
}

type Handshake = Arc<dyn Fn(&mut UnixStream) -> std::io::Result<()> + Send + Sync>;

fn case(
    handshake: impl Fn(&mut UnixStream) -> std::io::Result<()> + Send + Sync + 'static,
) -> Handshake {
    Arc::new(handshake)
}

#[test]
fn unusable_handshakes_are_refused() {
    let with_staging = || Greeting { staging: Some(STAGING), ..greeting() };
    let cases: [(&str, Handshake); 9] = [
        ("version 2", case(|stream| greet(stream, Greeting { version: 2, ..greeting() }, &[]))),
        ("passes no staging", case(move |stream| greet(stream, with_staging(), &[]))),
        ("without a staging", case(|stream| greet(stream, greeting(), &[&staging()]))),
        (
            "more than one",
            case(move |stream| greet(stream, with_staging(), &[&staging(), &staging()])),
        ),
        ("smaller than it says", {
            let large = Greeting { staging: Some(STAGING + 1), ..greeting() };
            case(move |stream| greet(stream, large, &[&staging()]))
        }),
        ("not a memfd", {
            let pipe = std::io::pipe().unwrap().0;
            let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
            case(move |stream| greet(stream, with_staging(), &[&pipe]))
        }),
        (
            "unknown flag",
            case(|stream| {
                let mut bytes = Reply::Handshake(greeting()).encode();
                bytes[18] = 4;
                stream.write_all(&bytes)
            }),
        ),
        (
            "does not begin with a handshake",
            case(|stream| stream.write_all(&Reply::Zero { tag: 1 }.encode())),
        ),
        (
            "the pager refuses: not today\u{fffd}[2J",
            case(|stream| {
                let text = "not today\x1b[2J".to_owned();
                stream.write_all(&Reply::Error { tag: 0, retry: Retry::Later, text }.encode())
            }),
        ),
    ];
    for (words, handshake) in cases {
        let fake = Fake::start(move |stream| handshake(stream).map(|()| thread::park()));
        let error = fake.open(PagerOptions::default()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.retry(), Retry::Later);
    }
}

#[test]
fn silent_pager_is_given_up() {
    let fake = Fake::start(|_| {
        thread::park();
        Ok(())
    });
    let options = PagerOptions { connect: Duration::from_millis(100), ..PagerOptions::default() };
    let error = fake.open(options).unwrap_err().to_string();
    assert!(error.contains("has not answered the handshake for 100ms"), "{error}");
    let fake = Fake::start(|_| Ok(()));
    let error = fake.open(PagerOptions::default()).unwrap_err().to_string();
    assert!(error.contains("the connection broke: the pager closed it"), "{error}");
}

#[test]
fn errors_of_the_pager_are_passed_on() {
    let fake = Fake::start(|stream| {
        greet(stream, greeting(), &[])?;
        loop {
            let Fault { tag, offset, .. } = fault(stream)?;
            let retry = if offset == 0 { Retry::Later } else { Retry::Never };
            let text = "the disk is on fire; see its log".to_owned();
            stream.write_all(&Reply::Error { tag, retry, text }.encode())?;
        }
    });
    let source = fake.open(PagerOptions::default()).unwrap();
    for (offset, retry) in [(0, Retry::Later), (SIZE - 4096, Retry::Never)] {
        let (completion, _bytes) = submit(&source, Priority::Demand, offset, 4096);
        let error = completion.wait().unwrap_err();
        let words = format!(
            "the pager failed to serve 4096 bytes at offset {offset}: the disk is on fire; see \
             its log"
        );
        assert!(error.to_string().ends_with(&words), "{error}");
        assert_eq!(error.retry(), retry);
    }
    assert_eq!(fake.connections(), 1);
}
