// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs: chunks of one request of background fill that lie side by side in a pack, and are read by
//! one request to the store.

use std::sync::Arc;

#[cfg(feature = "cache")]
use tokio::time::Instant;

use super::{Flights, Got, Key, Landing, Urgency};
use crate::image::block::{ALIGNMENT, Entry};
#[cfg(feature = "cache")]
use crate::image::host::{Keep, Room, Step};

/// Maximum length of a request, in bytes: 8 ms at a gigabit per second, which a fault may wait.
const MOST: u32 = 1 << 20;

/// A chunk of a run.
pub(super) struct Member {
    pub(super) chunk: u64,
    pub(super) entry: Entry,
}

/// A chunk that is read for the run, and the claim with which the host cache keeps it.
struct Fetch<'a> {
    member: Member,
    urgency: Arc<Urgency>,
    landing: Landing<'a>,
    #[cfg(feature = "cache")]
    keep: Option<Keep>,
}

/// Divides chunks into those that lie side by side, in this order.
fn divide(members: Vec<Member>) -> Vec<Vec<Member>> {
    let mut runs: Vec<Vec<Member>> = Vec::new();
    for member in members {
        match runs.last_mut() {
            Some(run)
                if run.last().is_some_and(|last| is_next(&last.entry, &member.entry))
                    && member.entry.offset + member.entry.len - run[0].entry.offset <= MOST =>
            {
                run.push(member);
            }
            _ => runs.push(vec![member]),
        }
    }
    runs
}

/// Returns whether a chunk lies right behind another one.
fn is_next(last: &Entry, next: &Entry) -> bool {
    let gap = next.offset.checked_sub(last.offset + last.len);
    next.pack == last.pack && gap.is_some_and(|gap| gap < ALIGNMENT)
}

impl Flights {
    /// Begins requests for the chunks of a request of fill, which wait for their turn until then.
    pub(super) fn start_runs(self: &Arc<Self>, queued: Vec<Member>) {
        for run in divide(queued) {
            let this = self.clone();
            crate::runtime::handle().spawn(async move { this.fly_run(run).await });
        }
    }

    /// Reads the chunks of a run when its turn comes. Those that a thread waits for by then have
    /// requests of their own.
    async fn fly_run(self: Arc<Self>, run: Vec<Member>) {
        let _turn = self.fill.acquire().await;
        let mut fetches: Vec<Fetch<'_>> = Vec::new();
        let mut members = run.into_iter();
        while let Some(member) = members.next() {
            let gap =
                fetches.last().is_some_and(|last| !is_next(&last.member.entry, &member.entry));
            if gap {
                // The rest waits for a turn of its own, so that no fault there waits for this one.
                self.start_runs(std::iter::once(member).chain(members).collect());
                break;
            }
            let key = Key::Chunk(member.chunk);
            let Some(urgency) = self.leave_run(key) else { continue };
            let landing = Landing { flights: &self, key };
            if !self.is_wanted(key) {
                // It has ended already.
                std::mem::forget(landing);
                continue;
            }
            #[cfg(feature = "cache")]
            let keep = match &self.host {
                None => None,
                Some(host) => {
                    // Waiting for more room while it has some could be for ever.
                    let room = if fetches.is_empty() { Room::Awaited } else { Room::Now };
                    let Member { chunk, entry } = &member;
                    match host.step(&self.snapshot, *chunk, entry, Instant::now(), room).await {
                        Step::Found(content) => {
                            self.finish(landing, Ok(Got::Chunk(Arc::new(content))));
                            continue;
                        }
                        Step::Fetch(keep) => keep,
                        Step::Wait(_) => {
                            // Another process makes the request, which this one awaits by itself.
                            std::mem::forget(landing);
                            self.depart(key);
                            continue;
                        }
                    }
                }
            };
            fetches.push(Fetch {
                member,
                urgency,
                landing,
                #[cfg(feature = "cache")]
                keep,
            });
        }
        self.fetch_run(fetches).await;
    }

    /// Reads chunks that lie side by side.
    async fn fetch_run(self: &Arc<Self>, mut run: Vec<Fetch<'_>>) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
        let start = first.member.entry.offset;
        let range = start..last.member.entry.offset + last.member.entry.len;
        let (len, begun) = (u64::from(range.end - range.start), std::time::Instant::now());
        let read = self.snapshot.read_packed(&first.member.entry, range).await;
        if read.is_ok() {
            self.state().around.answered(len, run.len(), begun.elapsed());
        }
        let read = read.map_err(Arc::new);
        // Those that a thread waits for by now come first.
        run.sort_by_key(|fetch| !fetch.urgency.is_raised());
        for fetch in run {
            let Member { chunk, entry } = fetch.member;
            let _turn = fetch.urgency.turn(&self.demand_decoders, &self.fill_decoder).await;
            let got = read.clone().and_then(|bytes| {
                let at = (entry.offset - start) as usize;
                let stored = bytes.slice(at..at + entry.len as usize);
                let content = Arc::new(self.snapshot.decode(chunk, &entry, &stored)?);
                #[cfg(feature = "cache")]
                if let Some(keep) = fetch.keep {
                    return Ok(Got::Claimed(content, keep, stored));
                }
                Ok(Got::Chunk(content))
            });
            self.finish(fetch.landing, got);
        }
    }
}
