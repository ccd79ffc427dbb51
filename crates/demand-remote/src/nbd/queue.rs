// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The queues of requests, one for demand and one for fill, which the connections take from.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_source::Priority;
use tokio::sync::{Notify, watch};

use super::error::NbdError;
use super::extents::Query;
use super::flight::{Flight, Work};
use super::piece::{Geometry, Piece};
use super::reply;

/// The index of a priority's queue and connections.
fn lane(priority: Priority) -> usize {
    match priority {
        Priority::Demand => 0,
        Priority::Fill => 1,
    }
}

fn other(priority: Priority) -> Priority {
    match priority {
        Priority::Demand => Priority::Fill,
        Priority::Fill => Priority::Demand,
    }
}

/// Number of pieces from which a demand request waits for the shorter ones.
const LONG: usize = 16;

#[derive(Default)]
struct Queues {
    /// By lane.
    waiting: [VecDeque<Work>; 2],
    /// Demand requests of many pieces, such as a huge page of 1 GiB. A fault of one page does not
    /// wait for them.
    long: VecDeque<Work>,
    /// Number of connections that work, by lane.
    live: [usize; 2],
    closed: bool,
}

/// The part of a source that its connections share.
pub(crate) struct Shared {
    /// The export, as errors call it.
    pub(crate) export: String,
    pub(crate) geometry: Geometry,
    queues: Mutex<Queues>,
    /// Wakes a connection of a lane for a request.
    wake: [Notify; 2],
    /// Wakes the connections that pause before they connect again.
    recovered: Notify,
    closing: watch::Sender<bool>,
    /// The requests in flight, by connection.
    pub(crate) flights: Vec<Mutex<Flight>>,
}

impl Queues {
    fn take(&mut self, priority: Priority) -> Option<Work> {
        let next = self.waiting[lane(priority)].pop_front();
        match priority {
            Priority::Demand => next.or_else(|| self.long.pop_front()),
            Priority::Fill => next,
        }
    }

    fn is_empty(&self, priority: Priority) -> bool {
        let long = priority == Priority::Demand && !self.long.is_empty();
        self.waiting[lane(priority)].is_empty() && !long
    }

    /// Empties the queues.
    #[must_use = "requests are failed with no lock held"]
    fn clear(&mut self) -> impl Iterator<Item = Work> + use<> {
        let waiting = std::mem::take(&mut self.waiting).into_iter().flatten();
        waiting.chain(std::mem::take(&mut self.long))
    }
}

impl Shared {
    pub(crate) fn new(export: String, geometry: Geometry, connections: usize) -> Arc<Self> {
        Arc::new(Shared {
            export,
            geometry,
            queues: Mutex::default(),
            wake: Default::default(),
            recovered: Notify::new(),
            closing: watch::Sender::new(false),
            flights: (0..connections).map(|_| Mutex::default()).collect(),
        })
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the requests in flight on a connection.
    pub(crate) fn flight(&self, connection: usize) -> MutexGuard<'_, Flight> {
        reply::lock(&self.flights[connection])
    }

    /// Queues requests.
    pub(crate) fn push(&self, priority: Priority, work: Vec<Work>) {
        let mut queues = self.queues();
        if queues.closed {
            // They are dropped, with no lock held.
            drop(queues);
            return;
        }
        if priority == Priority::Demand && work.len() > LONG {
            queues.long.extend(work);
        } else {
            queues.waiting[lane(priority)].extend(work);
        }
        let served_by = match queues.live[lane(priority)] {
            0 => other(priority),
            _ => priority,
        };
        drop(queues);
        self.wake[lane(served_by)].notify_one();
    }

    /// Queues a look-up of extents, if one is due.
    pub(crate) fn look_up(&self, query: Option<Query>) {
        if let Some(query) = query {
            self.push(Priority::Demand, vec![Work::Status(query)]);
        }
    }

    /// Takes the next request for a connection of a lane. A lane without a connection is served by
    /// the other one: demand first, and fill if `room` is left for it.
    pub(crate) fn pop(&self, priority: Priority, room: bool) -> Option<Work> {
        let mut queues = self.queues();
        let helps = queues.live[lane(other(priority))] == 0;
        match priority {
            Priority::Fill if helps => {
                queues.take(Priority::Demand).or_else(|| queues.take(Priority::Fill))
            }
            Priority::Demand if helps && room => {
                queues.take(Priority::Demand).or_else(|| queues.take(Priority::Fill))
            }
            priority => queues.take(priority),
        }
    }

    /// Wakes another connection if requests are left that a connection of this lane may serve.
    pub(crate) fn pass_on(&self, priority: Priority) {
        if !self.queues().is_empty(priority) {
            self.wake[lane(priority)].notify_one();
        }
    }

    /// Gives queued fill that touches these bytes the priority of demand. A request moves as a
    /// whole: it owns the destinations of all its pages.
    pub(crate) fn raise(&self, offset: u64, len: u64) {
        let mut queues = self.queues();
        let request = |work: &Work| match work {
            Work::Read(piece) if piece.part().touches(offset, len) => Some(piece.part().request()),
            _ => None,
        };
        let fill = &mut queues.waiting[lane(Priority::Fill)];
        let wanted: HashSet<usize> = fill.iter().filter_map(request).collect();
        if wanted.is_empty() {
            return;
        }
        let mut raised = Vec::new();
        for work in std::mem::take(fill) {
            match work {
                Work::Read(piece) if wanted.contains(&piece.part().request()) => {
                    raised.extend(Piece::raise(piece, &self.geometry).into_iter().map(Work::Read));
                }
                work => fill.push_back(work),
            }
        }
        drop(queues);
        self.push(Priority::Demand, raised);
    }

    /// Waits for a request for a lane.
    pub(crate) async fn woken(&self, priority: Priority) {
        self.wake[lane(priority)].notified().await;
    }

    /// Waits until a connection works again.
    pub(crate) async fn recovery(&self) {
        self.recovered.notified().await;
    }

    /// Records that the server has answered a request on a new connection.
    pub(crate) fn recovered(&self) {
        self.recovered.notify_waiters();
    }

    /// Records that a connection works.
    pub(crate) fn up(&self, priority: Priority) {
        self.queues().live[lane(priority)] += 1;
        self.wake.iter().for_each(Notify::notify_one);
    }

    /// Records that a connection is broken.
    pub(crate) fn down(&self, priority: Priority) {
        self.queues().live[lane(priority)] -= 1;
        // The other lane may have to help.
        self.wake.iter().for_each(Notify::notify_one);
    }

    /// Records that a connection could not be made. If none is left, all that waits fails.
    pub(crate) fn unreachable(&self, error: &Arc<NbdError>) {
        let mut queues = self.queues();
        if queues.live != [0, 0] {
            return;
        }
        let waiting = queues.clear();
        drop(queues);
        waiting.for_each(|work| work.fail(error));
    }

    /// Returns a receiver of the source's end.
    pub(crate) fn closing(&self) -> Closing {
        Closing(self.closing.subscribe())
    }

    /// Ends the source: what waits, and what is in flight, is answered.
    pub(crate) fn close(&self) {
        let mut queues = self.queues();
        queues.closed = true;
        let waiting = queues.clear();
        drop(queues);
        self.closing.send_replace(true);
        drop(waiting);
        for connection in 0..self.flights.len() {
            let flying = self.flight(connection).take();
            drop(flying);
        }
    }
}

/// Receives the end of the source.
pub(crate) struct Closing(watch::Receiver<bool>);

impl Closing {
    /// Waits until the source is dropped.
    pub(crate) async fn wait(&mut self) {
        // It fails only if the sender is gone, which is the same.
        let _ = self.0.wait_for(|closing| *closing).await;
    }

    pub(crate) fn is_closing(&self) -> bool {
        *self.0.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::{Blocks, Export};
    use demand_source::{Chunk, Completion, Destination, Request, SourceError};

    fn shared() -> Arc<Shared> {
        let blocks = Blocks { least: 1, most: 32 << 20 };
        let geometry = Geometry::new(&Export { size: 1 << 30, blocks, several: true });
        Shared::new("nbd://host/".into(), geometry, 2)
    }

    fn submit(shared: &Shared, priority: Priority, offset: u64, len: usize) -> Completion {
        let (destination, _) = Destination::owned(vec![0; len]);
        let request = Request { priority, chunks: vec![Chunk { offset, destination }] };
        let (pieces, completion) = Piece::all_of(request, &shared.geometry);
        shared.push(priority, pieces.into_iter().map(Work::Read).collect());
        completion
    }

    fn taken(shared: &Shared, priority: Priority, room: bool) -> Option<(u64, u64)> {
        let work = shared.pop(priority, room)?;
        let range = work.range();
        Some((range.start, range.end - range.start))
    }

    #[test]
    fn raised_fill_moves_in_pieces_of_demand() {
        let shared = shared();
        shared.up(Priority::Demand);
        shared.up(Priority::Fill);
        let _first = submit(&shared, Priority::Fill, 0, 2 << 20);
        let _second = submit(&shared, Priority::Fill, 2 << 20, 4096);
        shared.raise((2 << 20) - 1, 1);
        assert_eq!(taken(&shared, Priority::Fill, true), Some((2 << 20, 4096)));
        assert_eq!(taken(&shared, Priority::Fill, true), None);
        let pieces: Vec<_> =
            std::iter::from_fn(|| taken(&shared, Priority::Demand, true)).collect();
        assert_eq!(pieces.len(), 8);
        assert_eq!(pieces[7], ((2 << 20) - (256 << 10), 256 << 10));
    }

    #[test]
    fn single_page_overtakes_a_long_request() {
        let shared = shared();
        shared.up(Priority::Demand);
        let _long = submit(&shared, Priority::Demand, 1 << 20, 8 << 20);
        let _page = submit(&shared, Priority::Demand, 0, 4096);
        assert_eq!(taken(&shared, Priority::Demand, true), Some((0, 4096)));
        assert_eq!(taken(&shared, Priority::Demand, true), Some((1 << 20, 256 << 10)));
        let _page = submit(&shared, Priority::Demand, 0, 4096);
        assert_eq!(taken(&shared, Priority::Demand, true), Some((0, 4096)));
        assert_eq!(taken(&shared, Priority::Demand, true), Some((5 << 18, 256 << 10)));
    }

    #[test]
    fn lane_without_connection_is_served_by_the_other() {
        let shared = shared();
        shared.up(Priority::Demand);
        let _fill = submit(&shared, Priority::Fill, 0, 4096);
        let _demand = submit(&shared, Priority::Demand, 4096, 4096);
        assert_eq!(taken(&shared, Priority::Demand, true), Some((4096, 4096)));
        assert_eq!(taken(&shared, Priority::Demand, false), None);
        assert_eq!(taken(&shared, Priority::Demand, true), Some((0, 4096)));
        shared.up(Priority::Fill);
        let _fill = submit(&shared, Priority::Fill, 0, 4096);
        assert_eq!(taken(&shared, Priority::Demand, true), None);
        shared.down(Priority::Demand);
        let _demand = submit(&shared, Priority::Demand, 4096, 4096);
        assert_eq!(taken(&shared, Priority::Fill, true), Some((4096, 4096)));
        assert_eq!(taken(&shared, Priority::Fill, true), Some((0, 4096)));
    }

    #[test]
    fn closed_source_answers_what_waits() {
        let shared = shared();
        let waiting = submit(&shared, Priority::Demand, 0, 4096);
        shared.close();
        assert!(matches!(waiting.wait(), Err(SourceError::Abandoned)));
        let late = submit(&shared, Priority::Demand, 0, 4096);
        assert!(matches!(late.wait(), Err(SourceError::Abandoned)));
    }
}
