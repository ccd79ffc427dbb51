// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bitmaps of missing pages, for a pager that asks for them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use demand_source::MissingPages;

use crate::protocol::Call;
use crate::queue::Queue;

/// The bitmaps of all regions, each of which is sent once on each connection.
#[derive(Default)]
pub(crate) struct Watched(Mutex<State>);

#[derive(Default)]
struct State {
    regions: Vec<MissingPages>,
    /// Whether the pager at the other end of the present connection takes them.
    is_sent: bool,
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region.
    pub(crate) fn add(&self, missing: &MissingPages, queue: &Queue) {
        let mut state = self.lock();
        state.regions.retain(|region| region.words().is_some());
        state.regions.push(missing.clone());
        if state.is_sent {
            send(missing, queue);
        }
    }

    /// Begins a connection, whose pager `watches` the bitmaps or does not.
    pub(crate) fn begin(&self, watches: bool, queue: &Queue) {
        let mut state = self.lock();
        state.is_sent = watches;
        if watches {
            state.regions.iter().for_each(|region| send(region, queue));
        }
    }

    /// Ends the connection. Its queued messages may be cleared then.
    pub(crate) fn end(&self) {
        self.lock().is_sent = false;
    }
}

fn send(region: &MissingPages, queue: &Queue) {
    let Some(words) = region.words() else { return };
    let call = Call::Missing { offset: region.image_offset(), pages: region.pages() };
    queue.note(call, Some(words));
}
