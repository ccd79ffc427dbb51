// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several sources of one image: what one fails to deliver comes from another, and one that is back
//! is used again.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod far;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use demand_source::{
    Chunk, Destination, HashedSource, LocalFile, MissingPages, PageSource, Priority, Replicas,
    ReplicasError, Request, Retry, SourceError,
};
use far::{Counts, Far, Image, PAGE, SIZE, read, write};

/// Longest time to wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two sources of an image, and what each was asked.
fn two(image: &Image) -> (Replicas, [Arc<Counts>; 2]) {
    let ((first, of_first), (second, of_second)) =
        (Far::open(&image.memory), Far::open(&image.memory));
    let source = Replicas::new([("first".into(), first as _), ("second".into(), second as _)]);
    (source.unwrap(), [of_first, of_second])
}

fn set(counts: &Counts, fails: bool) {
    counts.fails.store(fails, Ordering::Release);
}

fn reads(counts: &[Arc<Counts>; 2]) -> [u64; 2] {
    [0, 1].map(|index| counts[index].reads.load(Ordering::Acquire))
}

fn down(source: &Replicas) -> [bool; 2] {
    [0, 1].map(|index| source.states()[index].is_down)
}

/// Reads a page, and checks its content.
fn check(source: &dyn PageSource, image: &Image, page: u64) {
    let got = read(source, page * PAGE, PAGE as usize).unwrap();
    assert!(got == image.content[(page * PAGE) as usize..][..PAGE as usize], "page {page}");
}

#[test]
fn only_the_preferred_source_is_asked() {
    let image = write();
    let (source, counts) = two(&image);
    (0..20).for_each(|page| check(&source, &image, page));
    assert_eq!((reads(&counts), down(&source)), ([20, 0], [false; 2]));
    source.raise(0, PAGE);
    assert!(counts.iter().all(|counts| counts.raised.load(Ordering::Acquire) == 1));
}

#[test]
fn a_source_can_ask_the_others() {
    let image = write();
    let (source, counts) = two(&image);
    let ask = |of: usize| {
        let (destination, bytes) = Destination::owned(vec![0; 4096]);
        let chunks = vec![Chunk { offset: PAGE, destination }];
        let others = counts[of].others.lock().unwrap().clone().unwrap();
        let completion = others.submit(Request { priority: Priority::Demand, chunks })?;
        Some(completion.wait().and_then(|()| bytes.take()))
    };
    for (of, expected) in [(0, [0, 1]), (1, [1, 1])] {
        assert!(ask(of).unwrap().unwrap() == image.content[4096..8192]);
        assert_eq!(reads(&counts), expected);
    }
    // One that fails is down, and not asked again.
    set(&counts[1], true);
    assert!(ask(0).unwrap().is_err());
    assert_eq!(down(&source), [false, true]);
    assert!(ask(0).is_none() && ask(1).is_some());
    // One that comes later is asked.
    let (late, of_late) = Far::open(&image.memory);
    source.add(0, "late".into(), late).unwrap();
    assert!(ask(0).unwrap().is_ok() && of_late.reads.load(Ordering::Acquire) == 1);
    drop(source);
    assert!(ask(0).is_none());
}

/// A fault comes to need what fill has asked the first source for, which then fails.
#[test]
fn raised_request_is_urgent_elsewhere() {
    let image = write();
    let (source, counts) = two(&image);
    let demanded = || [0, 1].map(|index| counts[index].demanded.load(Ordering::Acquire));
    for (is_raised, expected) in [(false, [0, 0]), (true, [0, 1])] {
        set(&counts[0], true);
        let gate = counts[0].gate.lock().unwrap();
        let (destination, bytes) = Destination::owned(vec![0; 8192]);
        let chunks = vec![Chunk { offset: PAGE, destination }];
        let fill = source.submit(Request { priority: Priority::Fill, chunks });
        // Others are not meant.
        source.raise(0, PAGE);
        if is_raised {
            source.raise(2 * PAGE, PAGE);
        }
        drop(gate);
        fill.wait().unwrap();
        assert!(bytes.take().unwrap() == image.content[4096..12288]);
        assert_eq!(demanded(), expected);
        // The first one is up again.
        set(&counts[0], false);
        while down(&source)[0] {
            let (destination, _) = Destination::owned(vec![0; 4096]);
            let chunks = vec![Chunk { offset: 0, destination }];
            source.submit(Request { priority: Priority::Fill, chunks }).wait().unwrap();
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn all_sources_see_the_missing_pages_once() {
    let image = write();
    let (source, counts) = two(&image);
    let words = Arc::new(tempfile::tempfile().unwrap());
    source.share_missing(&MissingPages::new(0, SIZE / PAGE, &words));
    let (third, of_third) = Far::open(&image.memory);
    source.add(2, "third".into(), third).unwrap();
    let shared = |counts: &Counts| {
        let missing = counts.missing.lock().unwrap();
        missing.iter().map(MissingPages::pages).collect::<Vec<_>>()
    };
    for counts in [&counts[0], &counts[1], &of_third] {
        assert_eq!(shared(counts), [SIZE / PAGE]);
    }
    drop(words);
    source.share_missing(&MissingPages::new(0, 1, &Arc::new(tempfile::tempfile().unwrap())));
    let (fourth, of_fourth) = Far::open(&image.memory);
    source.add(3, "fourth".into(), fourth).unwrap();
    assert_eq!(shared(&of_fourth), [1], "the first region is gone");
}

#[test]
fn the_next_source_delivers_at_once() {
    let image = write();
    let (source, counts) = two(&image);
    set(&counts[0], true);
    (0..20).for_each(|page| check(&source, &image, page));
    assert_eq!((reads(&counts), down(&source)), ([0, 20], [true, false]));
    // Later requests did not ask it: only trials do, each after its pause.
    assert!(source.states()[0].failures < 5, "{:?}", source.states());
    // Several ranges of one request, and all of the image.
    let got = read(&source, 0, SIZE as usize).unwrap();
    assert!(got == image.content);
    let (one, of_one) = Destination::owned(vec![0; 10]);
    let (other, of_other) = Destination::owned(vec![0; 4096]);
    let chunks = vec![
        Chunk { offset: 4, destination: one },
        Chunk { offset: SIZE - 4096, destination: other },
    ];
    source.submit(Request { priority: Priority::Demand, chunks }).wait().unwrap();
    assert!(of_one.take().unwrap() == image.content[4..14]);
    assert!(of_other.take().unwrap() == image.content[SIZE as usize - 4096..]);
}

/// It is tried as long as pages are requested, and not by the requests themselves.
#[test]
fn recovered_source_is_preferred_again() {
    let image = write();
    let (source, counts) = two(&image);
    set(&counts[0], true);
    check(&source, &image, 0);
    set(&counts[0], false);
    let begun = Instant::now();
    while down(&source)[0] {
        assert!(begun.elapsed() < PATIENCE, "it is not tried");
        check(&source, &image, 1);
        thread::sleep(Duration::from_millis(20));
    }
    let before = reads(&counts);
    check(&source, &image, 2);
    assert_eq!(reads(&counts), [before[0] + 1, before[1]]);
}

#[test]
fn requests_fail_when_all_sources_do() {
    let image = write();
    let (source, counts) = two(&image);
    counts.iter().for_each(|counts| set(counts, true));
    for _ in 0..3 {
        let error = read(&source, 0, 4096).unwrap_err();
        assert!(error.to_string().contains("the server is away"), "{error}");
        assert_eq!(error.retry(), Retry::Later);
    }
    assert_eq!(down(&source), [true; 2]);
    // A request asks both, though both are down, so the first that is back delivers.
    set(&counts[1], false);
    check(&source, &image, 3);
    assert_eq!(down(&source), [true, false]);
}

#[test]
fn altered_page_comes_from_another_source() {
    let (good, bad) = (write(), write());
    let file = OpenOptions::new().write(true).open(&bad.memory).unwrap();
    file.write_all_at(&[0x55], 3 * PAGE + 9).unwrap();
    let hashed = |image: &Image| -> Arc<dyn PageSource> {
        let open = |path| Arc::new(LocalFile::open(path).unwrap());
        Arc::new(HashedSource::open(open(&image.memory), open(&image.hashes), "vm7").unwrap())
    };
    let sources = [("bad".into(), hashed(&bad)), ("good".into(), hashed(&good))];
    let source = Replicas::new(sources).unwrap();
    (0..8).for_each(|page| check(&source, &good, page));
    assert_eq!(down(&source), [true, false]);
    // Alone it is an error, and never content.
    let alone = Replicas::new([("bad".into(), hashed(&bad))]).unwrap();
    let error = read(&alone, 3 * PAGE, 4096).unwrap_err();
    assert!(matches!(error, SourceError::Altered { .. }), "{error}");
}

#[test]
fn late_source_takes_its_rank() {
    let image = write();
    let ((first, of_first), (late, of_late)) = (Far::open(&image.memory), Far::open(&image.memory));
    let source = Replicas::ranked([(1, "first".into(), first as _)]).unwrap();
    let counts = [of_first, of_late];
    check(&source, &image, 0);
    source.add(0, "late".into(), late).unwrap();
    let names: Vec<_> = source.states().into_iter().map(|state| state.name).collect();
    assert_eq!(names, ["late", "first"]);
    check(&source, &image, 1);
    assert_eq!(reads(&counts), [1, 1]);
    set(&counts[1], true);
    check(&source, &image, 2);
    let [late, first] = &source.states()[..] else { panic!("not two") };
    assert!(late.down_for.is_some() && first.down_for.is_none(), "{late:?}");
    let other = LocalFile::open(&image.hashes).unwrap();
    let error = source.add(2, "other".into(), Arc::new(other)).unwrap_err();
    assert!(matches!(error, ReplicasError::Sizes { .. }), "{error}");
}

#[test]
fn wrong_requests_blame_no_source() {
    let image = write();
    let (source, _) = two(&image);
    let error = read(&source, SIZE - 1, 2).unwrap_err();
    assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
    assert_eq!(down(&source), [false; 2]);
}

#[test]
fn withdrawn_request_asks_no_further_source() {
    let image = write();
    let (source, counts) = two(&image);
    set(&counts[0], true);
    let (destination, _bytes) = Destination::owned(vec![0; 4096]);
    let chunks = vec![Chunk { offset: 0, destination }];
    let gate = counts[0].gate.lock().unwrap();
    drop(source.submit(Request { priority: Priority::Fill, chunks }));
    drop(gate);
    let begun = Instant::now();
    while !down(&source)[0] {
        assert!(begun.elapsed() < PATIENCE, "the first source was not asked");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(reads(&counts), [0, 0]);
}

#[test]
fn different_images_are_refused() {
    let image = write();
    let [memory, hashes] = [&image.memory, &image.hashes]
        .map(|path| -> Arc<dyn PageSource> { Arc::new(LocalFile::open(path).unwrap()) });
    let len = hashes.size();
    let error = Replicas::new([("a".into(), memory), ("b".into(), hashes)]).unwrap_err();
    let (size, other_size) = (SIZE, len);
    let expected = ReplicasError::Sizes { first: "a".into(), other: "b".into(), size, other_size };
    assert_eq!(error, expected);
    assert_eq!(Replicas::new([]).unwrap_err(), ReplicasError::None);
}
