// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes that share a cache: each chunk crosses the network once, even if one of them is killed
//! or stopped meanwhile. `CACHE_READERS` gives their number (`rust-vmm-ci/soak --sources`).

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use test_support::wait::until;

use crate::child::{Ended, Reader, WINDOW};
use crate::server::Server;
use crate::shared::{distinct, files, push};
use crate::support::Place;

const CHUNKS: usize = 96;
/// Number of processes, unless the environment says otherwise.
const READERS: u64 = 8;

fn number_of_readers() -> u64 {
    std::env::var("CACHE_READERS").map_or(READERS, |number| number.parse().unwrap())
}

/// Keeps the processes of one test from those of another one, for which a small host has no room.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An image, a store with it, and a file with its content.
fn prepared() -> Place {
    let place = Place::new();
    let content = distinct(CHUNKS, 70);
    push(&place, "vm", &content);
    fs::write(place.path("content"), content).unwrap();
    place
}

impl Server {
    /// Starts a reader with the number as its name and seed.
    fn reader(&self, place: &Place, number: u64) -> Reader {
        let url = self.url(&number.to_string());
        Reader::start(&url, &place.path("cache"), &place.path("content"), number)
    }

    /// Returns how often each chunk was requested, by all readers but number `except`.
    fn counts(&self, except: Option<u64>) -> HashMap<String, usize> {
        let except = except.map(|number| number.to_string());
        let mut counts = HashMap::new();
        for (reader, object) in self.fetched() {
            if Some(&reader) != except.as_ref() {
                *counts.entry(object).or_default() += 1;
            }
        }
        counts
    }
}

/// Returns the number of requests for chunks that had been requested already.
fn repeated(counts: &HashMap<String, usize>) -> u64 {
    counts.values().map(|count| *count as u64 - 1).sum()
}

#[test]
fn each_chunk_is_fetched_once() {
    let _alone = alone();
    let place = prepared();
    let server = Server::start(&place.path("store"), Duration::from_millis(5), None);
    let readers: Vec<_> =
        (1..=number_of_readers()).map(|number| server.reader(&place, number)).collect();
    let Ended { overdue, hedges } = readers.into_iter().map(Reader::end).sum();
    let counts = server.counts(None);
    println!(
        "{} chunks, {} repeated, {overdue} overdue, {hedges} hedges",
        counts.len(),
        repeated(&counts)
    );
    assert_eq!(counts.len(), CHUNKS);
    // A reader that the host does not run for seconds is overtaken, and is not late otherwise.
    assert!(repeated(&counts) <= overdue + hedges);
    assert_eq!(files(&place.path("cache")).len(), 1);
    let later = server.reader(&place, number_of_readers() + 1);
    assert_eq!(later.end().overdue, 0);
    assert_eq!(server.counts(None), counts, "the last reader needs nothing");
}

/// Starts reader 1, whose claimed chunks never come, and others that wait for them.
fn with_a_silent_owner(signal: Signal) -> (Server, Ended) {
    let place = prepared();
    let delay = Duration::from_millis(2);
    let server = Server::start(&place.path("store"), delay, Some(("1", 20)));
    let owner = server.reader(&place, 1);
    let of_owner = || server.fetched().iter().filter(|(reader, _)| reader == "1").count();
    until("the owner has claimed nothing", || of_owner() > 20);
    let readers: Vec<_> =
        (2..=number_of_readers()).map(|number| server.reader(&place, number)).collect();
    until("no other reader has begun", || server.fetched().len() > of_owner() + 5);
    owner.signal(signal);
    (server, readers.into_iter().map(Reader::end).sum())
}

#[test]
fn claims_of_a_killed_owner_end() {
    let _alone = alone();
    let (server, Ended { overdue, hedges }) = with_a_silent_owner(Signal::KILL);
    let (all, others) = (server.counts(None), server.counts(Some(1)));
    println!("{} chunks, {} by others, {} repeated", all.len(), others.len(), repeated(&all));
    assert_eq!(all.len(), CHUNKS);
    assert!(repeated(&others) <= overdue + hedges, "{others:?}");
    // Those that the owner had requested and not written.
    assert!(
        (1..=2 * WINDOW as u64 + overdue + hedges).contains(&repeated(&all)),
        "{}",
        repeated(&all)
    );
}

#[test]
fn stopped_owner_is_overtaken() {
    let _alone = alone();
    let (server, Ended { overdue, hedges }) = with_a_silent_owner(Signal::STOP);
    let (all, others) = (server.counts(None), server.counts(Some(1)));
    println!("{} chunks, {} repeated, {overdue} overdue", all.len(), repeated(&all));
    assert_eq!(all.len(), CHUNKS);
    assert!(overdue >= 1, "the others did not wait for the owner");
    assert!(repeated(&all) <= overdue + hedges);
    // One of them has fetched each chunk for all.
    assert!(repeated(&others).saturating_sub(hedges) * 2 <= overdue, "{others:?}");
}
