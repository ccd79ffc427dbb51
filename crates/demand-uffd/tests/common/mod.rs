// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions and readers for all tests.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use demand_memory::{
    BackingKind, Mapping, MemfdBacking, PAGE_SIZE, Pager, PagerConfig, Retrier, RetryPolicy,
};
use demand_source::PageSource;
use demand_uffd::{Features, Userfaultfd};
use test_support::image::{Near, word_of};
use test_support::wait::{A_WHILE, PATIENCE};

pub(crate) fn pager_on(
    backing: Arc<MemfdBacking>,
    source: impl PageSource + 'static,
) -> Arc<Pager> {
    let policy = RetryPolicy { longest: Duration::from_millis(20), ..RetryPolicy::default() };
    let retrier = Retrier::new(policy, |_| {});
    Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing, Arc::new(source)) }).unwrap()
}

pub(crate) fn backing(kind: BackingKind, size: u64) -> Arc<MemfdBacking> {
    Arc::new(MemfdBacking::new(kind, size).unwrap().with_reservation(false))
}

pub(crate) fn pager(kind: BackingKind, size: u64) -> Arc<Pager> {
    pager_on(backing(kind, size), Near(size))
}

pub(crate) fn mapping(pager: &Arc<Pager>) -> Arc<Mapping> {
    Arc::new(pager.backing().map().unwrap())
}

pub(crate) fn uffd() -> Arc<Userfaultfd> {
    Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap())
}

pub(crate) fn base(mapping: &Mapping) -> u64 {
    mapping.address().as_ptr() as u64
}

/// Reads a word; waits if the page is trapped.
pub(crate) fn read(mapping: &Mapping, offset: u64) -> u64 {
    // SAFETY: `at` keeps the word within the mapping, and no reference to it exists.
    unsafe { mapping.at(offset).cast::<u64>().as_ptr().read_volatile() }
}

/// Reads a word on a new thread, so that a test whose fault is not served fails instead of hanging.
pub(crate) fn read_later(mapping: &Arc<Mapping>, offset: u64) -> Receiver<u64> {
    let (sender, receiver) = mpsc::channel();
    let mapping = mapping.clone();
    thread::spawn(move || {
        let _ = sender.send(read(&mapping, offset));
    });
    receiver
}

pub(crate) fn expect(reader: &Receiver<u64>, offset: u64) {
    let word = reader.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{offset:#x} not served"));
    assert_eq!(word, word_of(offset), "the word at {offset:#x}");
}

pub(crate) fn expect_blocked(reader: &Receiver<u64>) {
    if let Ok(word) = reader.recv_timeout(A_WHILE) {
        panic!("read {word:#x} before its page had arrived");
    }
}

/// Reads all words of a page, and compares them with the image's.
pub(crate) fn check_page(mapping: &Mapping, page: u64) {
    for offset in (page * PAGE_SIZE..(page + 1) * PAGE_SIZE).step_by(8) {
        assert_eq!(read(mapping, offset), word_of(offset), "the word at {offset:#x}");
    }
}
