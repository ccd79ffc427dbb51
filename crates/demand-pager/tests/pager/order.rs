// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The order and number of faults that a pager gets.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use demand_pager::PagerOptions;
use demand_pager::protocol::{Call, Fault, MOST};
use demand_source::{PageSource, Priority};
use test_support::wait::{A_WHILE, PATIENCE};

use crate::fake::{Fake, fault, greet, greeting, sevens};
use crate::support::submit;

/// A pager that answers only what the test wants, by the stream that it sends.
fn observed() -> (Fake, Receiver<Call>, Receiver<UnixStream>) {
    let (calls, seen) = channel();
    let (streams, stream) = channel();
    let channels = Arc::new(Mutex::new((calls, streams)));
    let fake = Fake::start(move |stream| {
        greet(stream, greeting(), &[])?;
        let (calls, streams) = channels.lock().unwrap().clone();
        let _ = streams.send(stream.try_clone()?);
        while let Some(call) = Call::read(stream)? {
            let _ = calls.send(call);
        }
        Ok(())
    });
    (fake, seen, stream)
}

fn next(seen: &Receiver<Call>) -> Fault {
    match seen.recv_timeout(PATIENCE).expect("a fault is sent") {
        Call::Fault(fault) => fault,
        other => panic!("no fault: {other:?}"),
    }
}

fn nothing_follows(seen: &Receiver<Call>) {
    assert!(seen.recv_timeout(A_WHILE).is_err());
}

#[test]
fn demand_does_not_wait_behind_fill() {
    let (fake, seen, streams) = observed();
    let options = PagerOptions { fill_window: 3, ..PagerOptions::default() };
    let source = fake.open(options).unwrap();
    let fill: Vec<_> = (0..10).map(|i| submit(&source, Priority::Fill, i << 12, 4096)).collect();
    let sent: Vec<_> = (0..3).map(|_| next(&seen)).collect();
    nothing_follows(&seen);
    assert!(sent.iter().all(|fault| fault.priority == Priority::Fill), "{sent:?}");
    // No fill is answered, but demand is.
    let mut stream = streams.recv().unwrap();
    for i in 100..200 {
        let (completion, bytes) = submit(&source, Priority::Demand, i << 12, 4096);
        let fault = next(&seen);
        assert_eq!((fault.offset, fault.priority), (i << 12, Priority::Demand));
        sevens(&mut stream, fault).unwrap();
        completion.wait().unwrap();
        assert_eq!(bytes.take().unwrap(), [7; 4096]);
    }
    // An answer makes room for the next fill, in any order.
    sevens(&mut stream, sent[1]).unwrap();
    assert_eq!(next(&seen).offset, 3 << 12);
    drop(source);
    assert_eq!(fill.into_iter().filter_map(|(fill, _)| fill.wait().err()).count(), 9);
}

#[test]
fn raised_fill_is_sent_as_demand() {
    let (fake, seen, streams) = observed();
    let options = PagerOptions { fill_window: 1, ..PagerOptions::default() };
    let source = fake.open(options).unwrap();
    let fill: Vec<_> = (0..10).map(|i| submit(&source, Priority::Fill, i << 12, 4096)).collect();
    let first = next(&seen);
    // One that waits, and the one that was sent.
    source.raise(8 << 12, 1);
    let raised = next(&seen);
    assert_eq!((raised.offset, raised.priority), (8 << 12, Priority::Demand));
    nothing_follows(&seen);
    source.raise(0, 4096);
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), Call::Raise(first.tag));
    // It is no longer counted as fill.
    assert_eq!(next(&seen).offset, 1 << 12);
    // The next connection is sent the same tags, demand first.
    streams.recv().unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    let again: Vec<_> = (0..3).map(|_| next(&seen)).collect();
    let named = |fault: &Fault| (fault.tag, fault.priority);
    let expected =
        [(first.tag, Priority::Demand), (raised.tag, Priority::Demand), (2, Priority::Fill)];
    assert_eq!(again.iter().map(named).collect::<Vec<_>>(), expected);
    drop(source);
    fill.into_iter().for_each(|(fill, _)| drop(fill.wait()));
}

#[test]
fn long_request_delays_no_page() {
    let (fake, seen, streams) = observed();
    let options = PagerOptions { demand_window: 8, ..PagerOptions::default() };
    let source = fake.open(options).unwrap();
    let (long, bytes) = submit(&source, Priority::Demand, 0, 4 << 20);
    let parts: Vec<_> = (0..2).map(|_| next(&seen)).collect();
    nothing_follows(&seen);
    assert!(parts.iter().all(|fault| fault.len as usize == MOST), "{parts:?}");
    let (short, _bytes) = submit(&source, Priority::Demand, 4096, 4096);
    let page = next(&seen);
    assert_eq!((page.offset, page.len), (4096, 4096));
    let mut stream = streams.recv().unwrap();
    sevens(&mut stream, page).unwrap();
    short.wait().unwrap();
    for part in parts {
        sevens(&mut stream, part).unwrap();
    }
    for _ in 2..(4 << 20) / MOST {
        sevens(&mut stream, next(&seen)).unwrap();
    }
    long.wait().unwrap();
    assert_eq!(bytes.take().unwrap(), vec![7; 4 << 20]);
}

#[test]
fn many_faults_wait_at_a_time() {
    let fake = Fake::start(|stream| {
        greet(stream, greeting(), &[])?;
        // In the reverse order, once all are here.
        let faults = (0..200).map(|_| fault(stream)).collect::<Result<Vec<_>, _>>()?;
        faults.into_iter().rev().try_for_each(|fault| sevens(stream, fault))?;
        std::thread::sleep(Duration::from_secs(60));
        Ok(())
    });
    let source = fake.open(PagerOptions::default()).unwrap();
    let reads: Vec<_> =
        (0..200).map(|i| submit(&source, Priority::Demand, i << 12, 4096)).collect();
    for (completion, bytes) in reads {
        completion.wait().unwrap();
        assert_eq!(bytes.take().unwrap(), [7; 4096]);
    }
}
