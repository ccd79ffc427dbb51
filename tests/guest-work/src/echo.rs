// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Echoes over the network card: its back-end reads each request from the kernel's buffer, and
//! writes the answer to a buffer where the kernel expects one. Each answer must equal its request
//! byte for byte, and must not arrive more often than it was requested. Networks lose packets, so
//! lost requests are repeated, and counted.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_work::Prove;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};
use rustix::net::{connect, recv, send, socket};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::block::{Block, check_start, step};
use crate::console::wrong;
use crate::network;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// The third word of a payload, which marks it as an echo.
const ECHO: u64 = 0x6f68_6365;
/// The time after which an answer counts as lost.
const AGAIN: Duration = Duration::from_millis(500);
/// The time to wait at the end for late answers.
const LAST: Duration = Duration::from_secs(3);
/// The maximum time that a request may go without any answer, however often it is repeated.
const PATIENCE: Duration = Duration::from_secs(60);

/// Types of ICMP messages.
const ANSWER: u8 = 0;
const REQUEST: u8 = 8;
/// Size of an ICMP message before its payload, in bytes: type, code, checksum, identifier, sequence
/// number.
const HEADER: usize = 8;
/// Distinguishes our requests from those of other programs, of which there are none.
const IDENTIFIER: u16 = 0x6470;
/// Limits of the payload's size in bytes: at least its name, and at most the capacity of an
/// Ethernet frame.
const LEAST: usize = 64;
const MOST: usize = 1500 - 20 - HEADER;

/// State shared by the thread and its creator.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    echoes: AtomicU64,
    lost: AtomicU64,
}

impl Shared {
    fn counts(&self) -> (u64, u64) {
        (self.echoes.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }
}

/// The running work on the network card.
pub(crate) struct Echo {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Echo {
    /// Brings the card up and starts to send requests.
    ///
    /// # Errors
    ///
    /// The card cannot be used.
    pub(crate) fn start(asked: &Prove) -> Result<Option<Self>> {
        if asked.echo == 0 {
            return Ok(None);
        }
        network::up(GUEST)?;
        let every = Duration::from_millis(asked.every_ms.max(1));
        let peer = connection(every).context("no echo can be asked for")?;
        let mut run = [0; 8];
        getrandom(&mut run, GetRandomFlags::empty())?;
        let mut book = Book::new(u64::from_le_bytes(run), asked.echo, every, Instant::now());
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let shared = shared.clone();
            move || work(&peer, &mut book, &shared)
        });
        Ok(Some(Self { shared, thread }))
    }

    /// Returns the number of requests answered so far, and the number of requests or answers lost.
    pub(crate) fn echoes(&self) -> (u64, u64) {
        self.shared.counts()
    }

    /// Stops when all requests are answered; returns the counts.
    pub(crate) fn finish(self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            wrong("work", "the thread that asks for echoes panicked");
        }
        network::no_errors().unwrap_or_else(|why| wrong("net", &format!("{why:#}")));
        self.shared.counts()
    }
}

/// Sends requests until stopped and all of them are answered.
fn work(peer: &OwnedFd, book: &mut Book, shared: &Shared) {
    let mut stopped = None;
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            let waited = stopped.get_or_insert_with(Instant::now).elapsed();
            let answered = book.open.iter().all(|open| open.times == 0);
            if answered && (book.surplus.is_empty() || waited > LAST) {
                return;
            }
        }
        turn(peer, book, stopped.is_none())
            .unwrap_or_else(|why| wrong("echo", &format!("{why:#}")));
        shared.echoes.store(book.answered, Ordering::Relaxed);
        shared.lost.store(book.lost(), Ordering::Relaxed);
    }
}

fn connection(patience: Duration) -> Result<OwnedFd> {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    connect(&socket, &SocketAddrV4::new(PEER, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    Ok(socket)
}

/// Sends the requests that are due, and processes the received packets.
fn turn(peer: &OwnedFd, book: &mut Book, new: bool) -> Result<()> {
    for message in book.due(Instant::now(), new)? {
        match send(peer, &message, SendFlags::empty()) {
            // The peer's address is not resolved yet, or there is no buffer space: treat it as
            // lost.
            Ok(_) | Err(Errno::HOSTUNREACH | Errno::NOBUFS) => {}
            Err(error) => return Err(error).context("a request could not be sent"),
        }
    }
    let mut packet = [0; 2048];
    loop {
        match recv(peer, &mut packet[..], RecvFlags::empty()) {
            Ok((length, _)) => book.take(&packet[..length], Instant::now())?,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(Errno::HOSTUNREACH) => {}
            Err(error) => return Err(error).context("no answer could be received"),
        }
        if book.open.iter().any(|open| open.due <= Instant::now()) {
            return Ok(());
        }
    }
}

/// A request in flight or, if not sent yet, the next one.
#[derive(Debug)]
struct Open {
    number: u64,
    /// Number of times it was sent.
    times: u64,
    /// Time when it was first sent.
    since: Instant,
    /// Time to send it, or to send it again.
    due: Instant,
}

/// The bookkeeping of requests and answers.
struct Book {
    run: u64,
    /// Pause between an answer and the next request.
    every: Duration,
    open: Vec<Open>,
    /// Number of the last request.
    last: u64,
    answered: u64,
    /// Answered requests that were sent more than once, with the number of answers that may still
    /// arrive.
    surplus: HashMap<u64, u64>,
}

impl Book {
    fn new(run: u64, open: u64, every: Duration, now: Instant) -> Self {
        let open = (1..=open).map(|number| Open { number, times: 0, since: now, due: now });
        let open: Vec<_> = open.collect();
        let last = open.len() as u64;
        Self { run, every, open, last, answered: 0, surplus: HashMap::new() }
    }

    fn lost(&self) -> u64 {
        self.surplus.values().sum()
    }

    /// Returns the messages to send now: those that are overdue again, and new ones if `new` is
    /// set.
    fn due(&mut self, now: Instant, new: bool) -> Result<Vec<Vec<u8>>> {
        let mut messages = Vec::new();
        let due = |open: &&mut Open| open.due <= now && (new || open.times > 0);
        for open in self.open.iter_mut().filter(due) {
            if open.times == 0 {
                open.since = now;
            }
            anyhow::ensure!(
                now - open.since < PATIENCE,
                "request {} was asked {} times and not answered within {PATIENCE:?}",
                open.number,
                open.times
            );
            open.times += 1;
            open.due = now + AGAIN;
            messages.push(request(self.run, open.number));
        }
        Ok(messages)
    }

    /// Checks a packet against the requests.
    fn take(&mut self, packet: &[u8], now: Instant) -> Result<()> {
        // The header holds its own length, in words of 4 bytes.
        let header = packet.first().map_or(0, |first| usize::from(first & 0xf) * 4);
        let message = packet.get(header..).context("a packet ends in its header")?;
        // The kernel's own messages arrive here too, for example that the peer is unreachable.
        if message.first() != Some(&ANSWER) {
            return Ok(());
        }
        let (fields, payload) =
            message.split_at_checked(HEADER).context("an answer ends in its header")?;
        let field = |at: usize| u16::from_be_bytes([fields[at], fields[at + 1]]);
        let sequence = field(6);
        anyhow::ensure!(
            fields[1] == 0 && field(4) == IDENTIFIER,
            "an answer has the header {fields:02x?}"
        );
        let place = self.open.iter().position(|open| open.number as u16 == sequence);
        let place = place.filter(|place| self.open[*place].times > 0);
        let surplus = self.surplus.keys().copied().find(|number| *number as u16 == sequence);
        let number = place.map(|place| self.open[place].number).or(surplus);
        let number = number.with_context(|| {
            format!("answer {sequence} came, and is none to what was asked, or one too many")
        })?;
        self.check(number, payload).with_context(|| format!("the answer to request {number}"))?;
        if let Some(place) = place {
            let open = &mut self.open[place];
            if open.times > 1 {
                self.surplus.insert(number, open.times - 1);
            }
            self.answered += 1;
            self.last += 1;
            *open = Open { number: self.last, times: 0, since: now, due: now + self.every };
        } else if let Some(left) = self.surplus.get_mut(&number) {
            *left -= 1;
            if *left == 0 {
                self.surplus.remove(&number);
            }
        }
        Ok(())
    }

    fn check(&self, number: u64, payload: &[u8]) -> Result<()> {
        let length = length(self.run, number);
        anyhow::ensure!(
            payload.len() == length,
            "has {} bytes, and {length} were sent",
            payload.len()
        );
        check_start(payload, [self.run, number, ECHO]).map_err(anyhow::Error::msg)
    }
}

/// Returns the size of a request's payload in bytes, which varies from request to request.
fn length(run: u64, number: u64) -> usize {
    LEAST + (step(run ^ number) >> 16) as usize % (MOST - LEAST + 1)
}

/// Returns the ICMP message of a request.
fn request(run: u64, number: u64) -> Vec<u8> {
    let mut block = Block::ZERO;
    block.fill([run, number, ECHO]);
    let mut message = vec![REQUEST, 0, 0, 0];
    message.extend(IDENTIFIER.to_be_bytes());
    message.extend((number as u16).to_be_bytes());
    message.extend(&block.0[..length(run, number)]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Returns the checksum of the internet protocols (RFC 1071).
fn checksum(message: &[u8]) -> u16 {
    let words = message
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or_default()));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(10);

    fn book(open: u64) -> (Book, Instant) {
        let now = Instant::now();
        (Book::new(77, open, EVERY, now), now)
    }

    /// Returns a peer's answer to a request, as it is received.
    fn answer(request: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet.extend(request);
        packet[20] = ANSWER;
        packet
    }

    #[test]
    fn answers_are_counted_and_followed_by_requests() {
        let (mut book, now) = book(2);
        let asked = book.due(now, true).unwrap();
        assert_eq!(asked.len(), 2);
        assert!(book.due(now, true).unwrap().is_empty());
        for message in &asked {
            assert_eq!(checksum(message), 0);
            book.take(&answer(message), now).unwrap();
        }
        assert_eq!((book.answered, book.lost()), (2, 0));
        assert!(book.due(now, true).unwrap().is_empty());
        assert!(book.due(now + EVERY, false).unwrap().is_empty());
        let next = book.due(now + EVERY, true).unwrap();
        assert_eq!(next.len(), 2);
        assert!(!asked.contains(&next[0]));
        // An unreachable peer is reported by the kernel.
        let mut unreachable = answer(&next[0]);
        unreachable[20] = 3;
        book.take(&unreachable, now).unwrap();
        assert_eq!(book.answered, 2);
    }

    #[test]
    fn every_byte_of_an_answer_counts() {
        let (mut book, now) = book(1);
        let packet = answer(&book.due(now, true).unwrap()[0]);
        // The kernel checks the checksum, and another type is not an answer.
        for at in (21..packet.len()).filter(|at| !(22..24).contains(at)) {
            let mut other = packet.clone();
            other[at] ^= 0x10;
            assert!(book.take(&other, now).is_err(), "{at}");
        }
        assert!(book.take(&packet[..packet.len() - 1], now).is_err());
        assert!(book.take(&packet[..22], now).is_err());
        book.take(&packet, now).unwrap();
    }

    #[test]
    fn repeated_request_has_at_most_two_answers() {
        let (mut book, now) = book(1);
        let first = book.due(now, true).unwrap().remove(0);
        let late = now + AGAIN;
        assert_eq!(book.due(late, false).unwrap(), std::slice::from_ref(&first));
        book.take(&answer(&first), late).unwrap();
        assert_eq!((book.answered, book.lost()), (1, 1));
        book.take(&answer(&first), late).unwrap();
        assert_eq!((book.answered, book.lost()), (1, 0));
        assert!(book.take(&answer(&first), late).is_err());
        // The same holds for an answer without a request.
        assert!(book.take(&answer(&request(77, 2)), late).is_err());
    }

    #[test]
    fn no_answer_for_long_is_wrong() {
        let (mut book, now) = book(1);
        book.due(now, true).unwrap();
        assert!(book.due(now + PATIENCE - EVERY, true).is_ok());
        assert!(book.due(now + PATIENCE + AGAIN, true).is_err());
    }
}
