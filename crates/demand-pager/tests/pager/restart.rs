// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pagers that are killed and started again.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use demand_source::{
    Chunk, Destination, Lender, PageSource, Priority, Request, Retry, SourceError,
};
use test_support::wait::{A_WHILE, until};

use crate::example::each;
use crate::image::image;
use crate::log_lines;
use crate::support::{EndsReaders, read, scrambled, submit};

/// No read fails while the pager is killed three times in the middle.
#[test]
fn killed_pager_is_a_pause() {
    let (folder, content) = image(8 << 20);
    each(&folder.path().join("memory"), |mut example| {
        let source = example.open("");
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
                        let offset = (scrambled(number) as usize % (content.len() - len)) & !4095;
                        let priority = if thread == 0 { Priority::Fill } else { Priority::Demand };
                        let bytes = read(source, priority, offset as u64, len);
                        assert!(bytes == content[offset..offset + len], "at {offset}");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..3 {
                let before = reads.load(Ordering::Relaxed);
                until("reads succeed", || reads.load(Ordering::Relaxed) > before + 5);
                example.kill();
                thread::sleep(A_WHILE / 10);
                example.restart();
            }
        });
        println!("{} reads succeeded, none failed", reads.into_inner());
    });
}

#[test]
fn log_names_faults_that_wait() {
    log_lines::keep();
    let (folder, content) = image(1 << 20);
    each(&folder.path().join("memory"), |mut example| {
        let source = example.open("");
        let name = example.location("").to_string();
        example.kill();
        let (completion, bytes) = submit(&source, Priority::Demand, 8192, 4096);
        let line = [&*name, "; connecting again; 1 fault waits, the oldest for"];
        until("a line says what waits", || !log_lines::with(&line).is_empty());
        println!("{}", log_lines::with(&line)[0]);
        assert!(log_lines::with(&line)[0].ends_with(" s: 4096 bytes at offset 8192"));
        example.restart();
        completion.wait().unwrap();
        assert!(bytes.take().unwrap() == content[8192..8192 + 4096]);
        assert_eq!(log_lines::with(&["connected to", &name, "again"]).len(), 1);
    });
}

#[test]
fn other_image_is_refused_until_first_returns() {
    let (folder, content) = image(1 << 20);
    let (path, aside) = (folder.path().join("memory"), folder.path().join("aside"));
    each(&path, |mut example| {
        let source = example.open("");
        example.kill();
        std::fs::rename(&path, &aside).unwrap();
        for (len, what) in [(2 << 20, "its size differs"), (1 << 20, "its generation id differs")] {
            std::fs::write(&path, vec![9; len]).unwrap();
            example.restart();
            let error = loop {
                // A fault that was sent to no pager waits for the next one.
                let (completion, bytes) = submit(&source, Priority::Demand, 4096, 4096);
                let error = completion.wait().unwrap_err();
                assert!(bytes.take().is_err());
                if error.to_string().contains(what) {
                    break error;
                }
            };
            assert_eq!(error.retry(), Retry::Never, "{error}");
            println!("{error}");
            example.kill();
        }
        std::fs::rename(&aside, &path).unwrap();
        example.restart();
        until("the original image is read", || {
            let (completion, bytes) = submit(&source, Priority::Demand, 4096, 4096);
            completion.wait().is_ok() && bytes.take().unwrap() == content[4096..8192]
        });
    });
}

#[test]
fn dropped_source_answers_its_requests() {
    let (folder, _) = image(1 << 20);
    each(&folder.path().join("memory"), |mut example| {
        let source = example.open("");
        example.kill();
        let waiting: Vec<_> =
            (0..20).map(|i| submit(&source, Priority::Demand, i << 12, 4096)).collect();
        drop(source);
        for (completion, bytes) in waiting {
            let error = completion.wait().unwrap_err();
            assert!(matches!(error, SourceError::Abandoned), "{error}");
            assert!(bytes.take().is_err());
        }
    });
}

/// Memory of a VM that may end.
#[derive(Default)]
struct Lent {
    stopped: AtomicBool,
    returned: AtomicBool,
}

impl Lender for Lent {
    fn take_back(&self, _: usize) {
        self.returned.store(true, Ordering::SeqCst);
    }
    fn is_wanted(&self) -> bool {
        !self.stopped.load(Ordering::SeqCst)
    }
}

#[test]
fn stopped_memory_returns_without_a_pager() {
    let (folder, _) = image(1 << 20);
    each(&folder.path().join("memory"), |mut example| {
        let source = example.open("");
        example.kill();
        let lent = Arc::new(Lent::default());
        let page = NonNull::from(Box::leak(Box::new([0u8; 4096]))).cast();
        // SAFETY: the page is never freed, and no reference to it is left.
        let destination = unsafe { Destination::new(page, 4096, Some(lent.clone())) };
        let chunks = vec![Chunk { offset: 0, destination }];
        let completion = source.submit(Request { priority: Priority::Demand, chunks });
        thread::sleep(A_WHILE);
        assert!(!lent.returned.load(Ordering::SeqCst));
        lent.stopped.store(true, Ordering::SeqCst);
        until("the memory is back", || lent.returned.load(Ordering::SeqCst));
        assert!(matches!(completion.wait(), Err(SourceError::Withdrawn)));
    });
}
