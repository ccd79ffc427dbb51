// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chunks beside one that a fault needs: they are read as background fill is, and kept for
//! faults that follow.

use std::collections::hash_map::Entry as Slot;
use std::sync::{Arc, MutexGuard};

use super::run::Member;
use super::{AroundStats, Flight, Flights, Key, State};

impl Flights {
    /// Begins requests for chunks beside one that a fault needs, whose own request has begun. The
    /// nearest come first, on both sides. Those that were fetched before are left out, so that a
    /// reader in one direction gets what lies ahead.
    pub(super) fn add_neighbours(self: &Arc<Self>, mut state: MutexGuard<'_, State>, chunk: u64) {
        let count = state.around.count();
        if count == 0 {
            return;
        }
        let chunks = self.snapshot.head.geometry.chunks();
        let ahead = (1..=count).filter_map(|by| chunk.checked_add(by));
        let both = ahead.zip((1..=count).map(|by| chunk.checked_sub(by)));
        let nearest = both.flat_map(|(after, before)| [Some(after), before]).flatten();
        let mut members = Vec::new();
        for chunk in nearest.filter(|chunk| *chunk < chunks) {
            if members.len() as u64 == count {
                break;
            }
            // One whose block of the index is not known would cost two requests.
            let Some(Some(entry)) = self.snapshot.known_entry(chunk) else { continue };
            if state.around.was_fetched(chunk) {
                continue;
            }
            if let Slot::Vacant(slot) = state.flights.entry(Key::Chunk(chunk)) {
                slot.insert(Flight { in_run: true, is_neighbour: true, ..Flight::default() });
                state.around.requested(chunk);
                members.push(Member { chunk, entry });
            }
        }
        drop(state);
        members.sort_by_key(|member| member.chunk);
        self.start_runs(members);
    }

    /// Returns the use of these chunks so far.
    pub(crate) fn around_stats(&self) -> AroundStats {
        self.state().around.stats()
    }
}
