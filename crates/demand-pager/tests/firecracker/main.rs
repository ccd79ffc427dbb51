// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `FirecrackerSource` with the example handler, as a process that is killed meanwhile.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod handler;
#[path = "../pager/support.rs"]
mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use demand_pager::PagerOptions;
use demand_pager::firecracker::FirecrackerSource;
use demand_source::{PageSource, Priority, SourceError};
use handler::{Handler, Way};
use support::{EndsReaders, read, scrambled, submit};
use test_support::wait::{A_WHILE, until};

/// Size of the image, in bytes.
const SIZE: usize = 4 << 20;

/// Returns an image without a page of zeros, which are what a lost page would read as.
fn content() -> Vec<u8> {
    (0..SIZE as u64 / 8).flat_map(|word| (scrambled(word) | 1).to_le_bytes()).collect()
}

fn reads_all(source: &FirecrackerSource, content: &[u8]) {
    let mut reads = Vec::new();
    for number in 0..200 {
        let len = 4096 << (number % 7);
        let offset = (scrambled(number) as usize % (SIZE - len)) & !4095;
        let priority = if number % 3 == 0 { Priority::Fill } else { Priority::Demand };
        reads.push((offset, len, submit(source, priority, offset as u64, len)));
    }
    for (offset, len, (completion, bytes)) in reads {
        completion.wait().unwrap();
        assert!(bytes.take().unwrap() == content[offset..offset + len], "at {offset}");
    }
    assert!(read(source, Priority::Demand, 0, SIZE) == content);
}

#[test]
fn handlers_serve_every_byte() {
    let content = content();
    for way in [Way::Page, Way::Everything] {
        let handler = Handler::start(&content, way);
        let source = handler.open().unwrap();
        assert_eq!(source.size(), SIZE as u64);
        reads_all(&source, &content);
        let (completion, _bytes) = submit(&source, Priority::Demand, SIZE as u64 - 4096, 8192);
        assert!(matches!(completion.wait(), Err(SourceError::OutOfRange { .. })));
    }
}

/// No read fails, and none has a byte that the handler did not deliver.
#[test]
fn killed_handler_is_a_pause() {
    let content = content();
    let mut handler = Handler::start(&content, Way::Page);
    let source = handler.open().unwrap();
    let (reads, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let _ended = EndsReaders(&over);
        for thread in 0..4 {
            let (source, content, reads, over) = (&source, &content, &reads, &over);
            scope.spawn(move || {
                let mut number = thread << 32;
                while !over.load(Ordering::Relaxed) {
                    number += 1;
                    let len = 4096 << (number % 6);
                    let offset = (scrambled(number) as usize % (SIZE - len)) & !4095;
                    let bytes = read(source, Priority::Demand, offset as u64, len);
                    assert!(bytes == content[offset..offset + len], "at {offset}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..3 {
            let before = reads.load(Ordering::Relaxed);
            until("reads succeed", || reads.load(Ordering::Relaxed) > before + 5);
            handler.kill();
            thread::sleep(A_WHILE / 10);
            handler.restart();
        }
    });
    println!("{} reads succeeded, none failed", reads.into_inner());
}

/// Firecracker's examples kill the process that connected to them when they panic.
#[test]
fn handler_that_gives_up_ends_no_vmm() {
    let content = content();
    let mut handler = Handler::start(&content, Way::GivesUp);
    let source = handler.open().unwrap();
    let (completion, bytes) = submit(&source, Priority::Demand, 0, 1 << 20);
    handler.wait();
    handler.restart_as(Way::Page);
    completion.wait().unwrap();
    assert!(bytes.take().unwrap() == content[..1 << 20]);
}

#[test]
fn dropped_source_answers_its_requests() {
    let handler = Handler::start(&content(), Way::Never);
    let source = handler.open().unwrap();
    let waiting: Vec<_> =
        (0..100).map(|i| submit(&source, Priority::Demand, i << 12, 4096)).collect();
    thread::sleep(A_WHILE);
    drop(source);
    for (completion, bytes) in waiting {
        let error = completion.wait().unwrap_err();
        assert!(matches!(error, SourceError::Abandoned), "{error}");
        assert!(bytes.take().is_err());
    }
}

#[test]
fn unusable_handlers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none");
    let options = || PagerOptions { connect: Duration::from_secs(1), ..PagerOptions::default() };
    let error = FirecrackerSource::open(&socket, SIZE as u64, options()).unwrap_err().to_string();
    let expected = format!(
        "cannot use pager+firecracker:{}: the pager cannot be reached: No such file",
        socket.display()
    );
    assert!(error.starts_with(&expected), "{error}");
    for size in [0, 4097] {
        let error = FirecrackerSource::open(&socket, size, options()).unwrap_err().to_string();
        assert!(error.contains("no multiple of 4096"), "{error}");
    }
}
