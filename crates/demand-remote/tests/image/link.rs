// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images of a web server behind a link that is long, and that cuts, stalls, truncates and changes
//! what it carries.
#![cfg(feature = "http")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_remote::image::{FetchAround, RemoteOptions};
use demand_source::{Destination, PageSource, Replicas};
use test_support::proxy::{Fault, FaultProxy, Link};
use test_support::wait::until;

use crate::far::{self, CHUNK, Far};
use crate::support::{PAGE, Random, read};

#[test]
fn broken_answers_are_asked_for_again() {
    if let Some(far) = Far::new(16) {
        far::broken_answers_are_asked_for_again(&far);
    }
}

#[test]
fn changed_answers_are_never_content() {
    if let Some(far) = Far::new(16) {
        far::changed_answers_are_never_content(&far);
    }
}

#[test]
fn another_place_replaces_a_faulty_link() {
    let Some(far) = Far::new(4) else { return };
    let other = FaultProxy::start(far.target());
    for (chunk, fault) in
        [Fault::Flip(20_000), Fault::Refuse, Fault::Truncate(9)].into_iter().enumerate()
    {
        far.proxy.clear_fault();
        let place = |name: &str, proxy| -> (String, Arc<dyn PageSource>) {
            (name.into(), Arc::new(far.open_by(proxy, RemoteOptions::default())))
        };
        let source = Replicas::new([place("one", &far.proxy), place("two", &other)]).unwrap();
        let before = other.requests();
        far.proxy.set_fault(fault, usize::MAX);
        let (mut page, at) = (vec![0; PAGE], chunk * CHUNK);
        source.read_through(at as u64, &mut Destination::from(&mut page[..])).unwrap();
        assert!(page == far.content[at..][..PAGE], "{fault:?}");
        assert_eq!(other.requests(), before + 1, "{fault:?}");
        let states = source.states();
        assert!(states[0].is_down && !states[1].is_down, "{fault:?}: {states:?}");
    }
}

/// Reads pages over a link with and without fetch-around, in an order of chunks. Returns the number
/// of requests for each, without those that were made twice, and the number of extra pages.
fn requests_of(
    far: &Far,
    trip: Duration,
    (chunk_size, pages): (usize, usize),
    order: &[usize],
) -> [u64; 3] {
    far.proxy.set_link(Link::round_trip(trip));
    let [without, with] = [FetchAround::Off, FetchAround::Auto].map(|around| {
        let image = far.open_with(RemoteOptions { around, ..RemoteOptions::default() });
        let before = image.figures();
        for chunk in order {
            for page in 0..pages {
                let start = chunk * chunk_size + page * PAGE;
                assert!(read(&image, start, PAGE).unwrap() == far.content[start..][..PAGE]);
            }
        }
        let after = image.figures();
        println!("{around:?}: {after:?}");
        (after.reads.requests - before.reads.requests, after.around.extra_pages)
    });
    [without.0, with.0, with.1]
}

#[test]
fn sequential_reader_profits_from_fetch_around() {
    let Some(far) = Far::new(128) else { return };
    let order: Vec<usize> = (0..128).collect();
    let trip = Duration::from_millis(10);
    let [without, with, _] = requests_of(&far, trip, (CHUNK, CHUNK / PAGE), &order);
    assert_eq!(without, 128);
    assert!(with < without / 2, "{with}");
}

#[test]
fn random_reader_gives_fetch_around_up() {
    const SMALL: usize = 16 << 10;
    let Some(far) = Far::of(1024 * SMALL, SMALL) else { return };
    let mut order: Vec<usize> = (0..1024).step_by(4).collect();
    let mut random = Random::new(5);
    (1..order.len()).rev().for_each(|at| order.swap(at, random.below(at + 1)));
    let [without, with, extra] = requests_of(&far, Duration::from_millis(4), (SMALL, 1), &order);
    assert_eq!(without, 256);
    let most = 150 * (SMALL / PAGE) as u64;
    assert!(with < 256 * 3 / 2 && (1..most).contains(&extra), "{with}, {extra}");
}

#[test]
fn neighbours_are_awaited_by_faults() {
    let Some(far) = Far::new(8) else { return };
    let around = FetchAround::Bytes(4 * CHUNK as u64);
    let image = far.open_with(RemoteOptions { around, ..RemoteOptions::default() });
    far.proxy.set_link(Link::round_trip(Duration::from_millis(200)));
    let before = far.proxy.requests();
    far.check_chunk(&image, 0);
    // They are on their way, or have arrived.
    for chunk in 1..5 {
        far.check_chunk(&image, chunk);
    }
    assert_eq!(far.proxy.requests(), before + 2);
    let used = image.figures().around;
    assert_eq!((used.extra_pages, used.used_pages), (64, 4));
}

/// Reads chunks of an image of 128, so that the times of its requests are known, and a hedge can be
/// afforded.
fn learn(far: &Far, source: &dyn PageSource) {
    far.proxy.set_link(Link::round_trip(Duration::from_millis(40)));
    (0..40).for_each(|chunk| far.check_chunk(source, chunk));
    // None of these is late.
    far.proxy.set_link(Link::default());
    (40..70).for_each(|chunk| far.check_chunk(source, chunk));
}

#[test]
fn late_request_is_made_elsewhere_first() {
    let Some(far) = Far::new(128) else { return };
    let other = FaultProxy::start(far.target());
    let [one, two] = [&far.proxy, &other].map(|proxy| far.open_by(proxy, RemoteOptions::default()));
    let watch = one.watch();
    let places: [(String, Arc<dyn PageSource>); 2] =
        [("one".into(), Arc::new(one)), ("two".into(), Arc::new(two))];
    let source = Replicas::new(places).unwrap();
    learn(&far, &source);
    // A request to the second place, whose link works, and then to the first, once it does not.
    for (chunk, works) in [(100, true), (101, false)] {
        if !works {
            other.set_fault(Fault::Refuse, usize::MAX);
            while !source.states()[1].is_down {
                far.proxy.set_fault(Fault::Refuse, usize::MAX);
                let mut page = vec![0; PAGE];
                let at = 110 * CHUNK as u64;
                source.read_through(at, &mut Destination::from(&mut page[..])).unwrap_err();
                far.proxy.clear_fault();
            }
            // The first place is tried after its pause, and delivers.
            until("the first place is back", || {
                far.check_chunk(&source, 111);
                !source.states()[0].is_down
            });
            // For the hedges that the faults have cost.
            (70..100).chain(112..128).for_each(|chunk| far.check_chunk(&source, chunk));
        }
        let before = (watch.figures().hedges, far.proxy.requests(), other.requests());
        far.proxy.set_fault(Fault::Stall(20_000), 1);
        let begun = Instant::now();
        far.check_chunk(&source, chunk);
        // The connection's own limit is 5 seconds.
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        let hedges = watch.figures().hedges;
        let made = [far.proxy.requests() - before.1, other.requests() - before.2];
        println!("requests to both places: {made:?}, {hedges:?}");
        assert_eq!((hedges.made, hedges.won), (before.0.made + 1, before.0.won + 1));
        assert_eq!(hedges.elsewhere, before.0.elsewhere + u64::from(works));
        assert_eq!((made, far.proxy.faults_left()), (if works { [1, 1] } else { [2, 0] }, 0));
    }
}

#[test]
fn stalled_request_is_made_again() {
    let Some(far) = Far::new(128) else { return };
    let image = far.open();
    learn(&far, &image);
    let (before, requests) = (image.figures().hedges, far.proxy.requests());
    far.proxy.set_fault(Fault::Stall(20_000), 1);
    let begun = Instant::now();
    far.check_chunk(&image, 100);
    // The connection's own limit is 5 seconds.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let after = image.figures().hedges;
    assert_eq!((after.made, after.won), (before.made + 1, before.won + 1));
    assert_eq!((far.proxy.requests(), far.proxy.faults_left()), (requests + 2, 0));
}
