// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `PagerSource` with the example pagers, as processes that are killed and started again, and with
//! pagers that break the protocol.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod example;
mod fake;
mod image;
mod log_lines;
mod nonsense;
mod order;
mod restart;
mod support;
mod watch;

use demand_pager::{Location, PagerOptions, PagerSource};
use demand_source::{Destination, Extent, PageSource, Priority, Retry, SourceError};
use example::each;
use image::image;
use support::{read, scrambled, submit};

#[test]
fn examples_serve_every_byte() {
    let (folder, content) = image(3 << 20 | 4096 | 100);
    each(&folder.path().join("memory"), |example| {
        let source = example.open("");
        assert_eq!(source.size(), content.len() as u64);
        assert_eq!(source.extent(0).unwrap(), Extent::Data { end: source.size() });
        let mut reads = Vec::new();
        for number in 0..200 {
            let offset = (scrambled(number) as usize % content.len()) & !4095;
            let len = (4096 << (number % 9)).min(content.len() - offset);
            let priority = if number % 3 == 0 { Priority::Fill } else { Priority::Demand };
            reads.push((offset, len, submit(&source, priority, offset as u64, len)));
        }
        for (offset, len, (completion, bytes)) in reads {
            completion.wait().unwrap();
            assert!(bytes.take().unwrap() == content[offset..offset + len], "at {offset}");
        }
        assert!(read(&source, Priority::Demand, 0, content.len()) == content);
        let mut page = [0xee; 100];
        let last = content.len() as u64 - 100;
        source.read_through(last, &mut Destination::from(&mut page[..])).unwrap();
        assert_eq!(page, content[content.len() - 100..]);
    });
}

#[test]
fn files_of_a_folder_have_names() {
    let (folder, content) = image(64 << 10);
    std::fs::write(folder.path().join("hashes"), [7; 5000]).unwrap();
    each(folder.path(), |example| {
        let memory = example.open("?name=memory");
        let hashes = example.open("?name=hashes");
        assert!(read(&memory, Priority::Demand, 0, content.len()) == content);
        assert_eq!(read(&hashes, Priority::Fill, 0, 5000), [7; 5000]);
        assert_ne!(memory.generation(), hashes.generation());
        for name in ["state", "../memory", "/etc/passwd"] {
            let location = example.location(&format!("?name={name}"));
            let error = PagerSource::open(&location, PagerOptions::default()).unwrap_err();
            let text = format!("the pager refuses: it has no image '{name}': ");
            assert!(error.to_string().contains(&text), "{error}");
            assert_eq!(error.retry(), Retry::Never);
        }
    });
}

#[test]
fn ranges_outside_the_image_are_refused() {
    let (folder, _) = image(64 << 10);
    each(&folder.path().join("memory"), |example| {
        let source = example.open("");
        for (offset, len) in [(64 << 10, 4096), (60 << 10, 8192), (u64::MAX - 4095, 4096)] {
            let (completion, _bytes) = submit(&source, Priority::Demand, offset, len);
            let error = completion.wait().unwrap_err();
            assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
        }
    });
}

#[test]
fn absent_pager_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none");
    let open = |socket| PagerSource::open(&Location::new(socket, ""), PagerOptions::default());
    let error = open(socket.clone()).unwrap_err().to_string();
    let expected = format!("cannot use pager:{}: the pager cannot be reached: ", socket.display());
    assert!(error.starts_with(&expected), "{error}");
    let error = open("x".repeat(200).into()).unwrap_err().to_string();
    assert!(error.contains("cannot be reached: File name too long"), "{error}");
}
