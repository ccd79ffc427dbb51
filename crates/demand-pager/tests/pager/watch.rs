// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pagers that see the VMM's missing pages.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use demand_memory::{
    BackingKind, FaultPath, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Waiter,
};
use demand_pager::protocol::{Call, Greeting, Reply};
use demand_pager::{Calls, PagerOptions};
use demand_source::PageSource;
use test_support::wait::{PATIENCE, until};

use crate::fake::{Fake, SIZE, greet, greeting};

/// Offset and pages of a region, and its bitmap.
type Region = (u64, u64, File);

/// Answers all faults with zeros, and passes bitmaps on, until a fault of the last page, which ends
/// the connection.
fn serve(stream: &mut UnixStream, regions: &Sender<Region>) -> io::Result<()> {
    greet(stream, Greeting { watches: true, ..greeting() }, &[])?;
    let mut calls = Calls::new(stream);
    while let Some((call, file)) = calls.receive()? {
        match (call, file) {
            (Call::Missing { offset, pages }, Some(file)) => {
                let _ = regions.send((offset, pages, file));
            }
            (Call::Fault(fault), _) if fault.offset == SIZE - PAGE_SIZE => break,
            (Call::Fault(fault), _) => {
                let mut stream: &UnixStream = stream;
                stream.write_all(&Reply::Zero { tag: fault.tag }.encode())?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn watching() -> (Fake, Receiver<Region>) {
    let (sender, regions) = channel();
    let sender = Mutex::new(sender);
    let sender = Arc::new(sender);
    let fake = Fake::start(move |stream| {
        let regions = sender.lock().unwrap().clone();
        serve(stream, &regions)
    });
    (fake, regions)
}

/// Returns memory that is filled from the last pages of an image.
fn memory_of(source: Arc<dyn PageSource>, pages: u64) -> Arc<Pager> {
    let backing = MemfdBacking::new(BackingKind::Shmem, pages * PAGE_SIZE).unwrap();
    let config = PagerConfig::new(Arc::new(backing), source);
    Pager::new(PagerConfig { image_offset: SIZE - pages * PAGE_SIZE, ..config }).unwrap()
}

fn next(regions: &Receiver<Region>) -> Region {
    regions.recv_timeout(PATIENCE).expect("a bitmap must be passed")
}

fn missing(bitmap: &File, page: u64) -> bool {
    let mut word = [0; 8];
    bitmap.read_exact_at(&mut word, page / 64 * 8).unwrap();
    u64::from_le_bytes(word) >> (page % 64) & 1 == 1
}

#[test]
fn pager_sees_the_missing_pages() {
    let (fake, regions) = watching();
    let source = Arc::new(fake.open(PagerOptions::default()).unwrap());
    let pager = memory_of(source.clone(), 100);
    let (offset, pages, bitmap) = next(&regions);
    assert_eq!((offset, pages), (SIZE - 100 * PAGE_SIZE, 100));
    assert!((0..100).all(|page| missing(&bitmap, page)) && !missing(&bitmap, 100));
    pager.ensure(PageRange::page(70), FaultPath::Guest, &Waiter::new()).unwrap();
    assert!(!missing(&bitmap, 70) && missing(&bitmap, 69) && missing(&bitmap, 71));
    // A second region of the same image comes later.
    let _second = memory_of(source, 64);
    assert_eq!(next(&regions).1, 64);
}

#[test]
fn bitmap_cannot_be_written_to() {
    let (fake, regions) = watching();
    let _pager = memory_of(Arc::new(fake.open(PagerOptions::default()).unwrap()), 100);
    let (_, _, bitmap) = next(&regions);
    bitmap.write_all_at(&[0], 0).unwrap_err();
    bitmap.set_len(0).unwrap_err();
    assert!(missing(&bitmap, 0));
}

#[test]
fn new_connection_gets_the_living_bitmaps() {
    let (fake, regions) = watching();
    let source = Arc::new(fake.open(PagerOptions::default()).unwrap());
    let (kept, gone) = (memory_of(source.clone(), 100), memory_of(source, 64));
    assert_eq!([(); 2].map(|()| next(&regions).1), [100, 64]);
    drop(gone);
    // Page 99 is the image's last one, which ends each connection.
    kept.fetch(PageRange::page(99), FaultPath::Fill).unwrap();
    until("the source connects again", || fake.connections() >= 2);
    assert_eq!(next(&regions).1, 100);
    kept.ensure(PageRange::page(1), FaultPath::Guest, &Waiter::new()).unwrap();
    assert!(regions.try_iter().all(|(_, pages, _)| pages == 100), "the other region is gone");
}

#[test]
fn pager_that_does_not_ask_gets_no_bitmap() {
    let (sender, calls) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let fake = Fake::start(move |stream| {
        greet(stream, greeting(), &[])?;
        let sender = sender.lock().unwrap().clone();
        while let Some(call) = Call::read(stream)? {
            if let Call::Fault(fault) = &call {
                stream.write_all(&Reply::Zero { tag: fault.tag }.encode())?;
            }
            let _ = sender.send(call);
        }
        Ok(())
    });
    let pager = memory_of(Arc::new(fake.open(PagerOptions::default()).unwrap()), 100);
    pager.ensure(PageRange::page(3), FaultPath::Guest, &Waiter::new()).unwrap();
    let calls: Vec<_> = calls.try_iter().collect();
    assert!(!calls.is_empty() && calls.iter().all(|call| matches!(call, Call::Fault(_))));
}
