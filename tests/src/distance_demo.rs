// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The demo's third stage: a Linux guest is snapshotted, its snapshot is pushed to an S3 server,
//! and it is restored from there over a long link, without and with its working set.
//!
//! The server and the link are on the host. The guest runs there, too, or in the lab.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use demand_vmm::api::Go;
use demand_vmm::report::{WorkingSetReport, duration, size};
use guest_work::{Journal, Prove, Work};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use test_support::proxy::{self, FaultProxy, Link};
use test_support::servers::S3;

use crate::linux_vm::{Guest, GuestConfig, Kernel};
use crate::process::{program, succeed};

/// Time for a round trip of the link for which there are targets.
pub const ROUND_TRIP: Duration = Duration::from_millis(10);
/// Bytes per second of the link: 1 Gbit/s.
pub const RATE: u64 = 125_000_000;

/// Size of the guest's memory, in bytes.
const MEMORY: u64 = 192 << 20;
/// Size of the part that the guest verifies and rewrites, page by page, in bytes. The rest of what
/// it touches is its kernel's.
const WORKED_ON: u64 = 2 << 20;
/// Its pause after 64 pages, in microseconds: its beats have a turn, too, where the processor is
/// emulated.
const REST_US: u64 = 10_000;
/// Time between two of the guest's beats, in milliseconds.
const BEAT_MS: u64 = 50;
/// Most bytes of a restore's host cache.
const CACHE: &str = "size=1G";
/// Time limit for a recorded working set to be written.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time after a guest's end in which its last requests come to their ends.
const QUIET: Duration = Duration::from_millis(200);

/// The name of the lab as a place.
pub const LAB: &str = "lab";

const BUCKET: &str = "images";
const SNAPSHOT: &str = "s3://images/vm7";

/// The names of the rows that targets compare.
const LOCAL: &str = "all local";
const DEMAND: &str = "demand only";
const AROUND: &str = "fetch-around auto";
const RECORDED: &str = "the same, recorded";
const REPLAY: &str = "replay";
/// It sees all first touches, and not only a sample.
const AGAIN: &str = "replay, recorded again";

/// The object store, and the link to it.
#[derive(Debug)]
pub struct Server {
    store: S3,
    link: FaultProxy,
    _folder: TempDir,
}

impl Server {
    /// Starts the server, and a link to it with this time for a round trip; returns `None` if it is
    /// not installed.
    ///
    /// # Errors
    ///
    /// If there is no room for its files.
    pub fn start(round_trip: Duration) -> Result<Option<Self>> {
        let folder = tempfile::Builder::new().prefix("demand-paging-").tempdir()?;
        std::fs::create_dir(folder.path().join(BUCKET))?;
        let Some(store) = S3::start(folder.path()) else { return Ok(None) };
        let link = FaultProxy::start(proxy::Target::Port(store.port()));
        link.set_link(Link::round_trip(round_trip).rate(RATE));
        Ok(Some(Server { store, link, _folder: folder }))
    }

    /// Returns the variables with which a client finds the server over the link, if `host` is this
    /// machine's address.
    pub fn variables(&self, host: &str) -> [(&'static str, String); 3] {
        S3::variables_at(host, self.link.port())
    }

    /// Returns the server's port, to which the link does not apply.
    pub fn port(&self) -> u16 {
        self.store.port()
    }

    /// Returns the requests and the bytes that the link has carried so far.
    pub fn traffic(&self) -> Traffic {
        Traffic { requests: self.link.requests() as u64, bytes: self.link.sent() }
    }
}

/// Requests to the store, and bytes of their answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Number of GET requests.
    pub requests: u64,
    /// Bytes of the answers, with their heads.
    pub bytes: u64,
}

impl Traffic {
    /// Returns what was carried after another moment.
    #[must_use]
    pub fn since(self, before: Traffic) -> Traffic {
        Traffic { requests: self.requests - before.requests, bytes: self.bytes - before.bytes }
    }
}

/// A restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Time from the start of demand-vmm to the guest's first instruction, in microseconds.
    pub first_instruction_us: u64,
    /// Time from the start of demand-vmm to the guest's first beat, in microseconds.
    pub first_beat_us: u64,
    /// Time from the start of demand-vmm to the end of the guest's task, in microseconds.
    pub done_us: u64,
    /// Accesses that waited for a page to be fetched, until then; under a working set, until the
    /// notes of first touches end.
    pub demand_faults: u64,
    /// Requests and bytes that have crossed the link.
    pub traffic: Traffic,
    /// Figures for the working set; absent without one.
    pub working_set: Option<WorkingSetReport>,
}

/// A target, and whether a run has met it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The figure.
    pub name: String,
    /// Its value.
    pub measured: f64,
    /// Its bound: the least value, or the largest one.
    pub bound: f64,
    /// Whether the bound is the largest value.
    pub at_most: bool,
    /// Whether the value is within the bound.
    pub met: bool,
}

impl Target {
    fn at_least(name: &str, measured: f64, bound: f64) -> Self {
        let met = measured >= bound;
        Target { name: name.into(), measured, bound, at_most: false, met }
    }

    fn at_most(name: &str, measured: f64, bound: f64) -> Self {
        let met = measured <= bound;
        Target { name: name.into(), measured, bound, at_most: true, met }
    }
}

/// The report of the stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistanceReport {
    /// "distance".
    pub stage: String,
    /// The machine whose KVM has run the guests: "host" or "lab".
    pub place: String,
    /// Time for a round trip of the link, in microseconds.
    pub round_trip_us: u64,
    /// Bytes per second of the link.
    pub bytes_per_second: u64,
    /// The restores.
    pub rows: Vec<Row>,
    /// The targets that they allow to judge.
    pub targets: Vec<Target>,
}

impl DistanceReport {
    /// Creates the report of restores at a place, over a link with this time for a round trip.
    pub fn new(place: &str, round_trip: Duration, rows: Vec<Row>) -> Self {
        DistanceReport {
            stage: "distance".into(),
            place: place.into(),
            round_trip_us: micros(round_trip),
            bytes_per_second: RATE,
            targets: if round_trip == ROUND_TRIP { targets(&rows) } else { Vec::new() },
            rows,
        }
    }

    /// Returns the report as a table for people.
    pub fn table(&self) -> String {
        let mut table = format!(
            "distance: guests in the {}, an S3 server over a round trip of {} and {} Mbit/s\n",
            self.place,
            duration(self.round_trip_us),
            self.bytes_per_second * 8 / 1_000_000
        );
        table += &format!(
            "  {:<24}{:>9}{:>9}{:>9}{:>8}{:>9}{:>9}{:>7}{:>6}{:>7}{:>7}\n",
            "restore",
            "runs",
            "beats",
            "done",
            "faults",
            "requests",
            "fetched",
            "hits",
            "late",
            "misses",
            "waste"
        );
        for row in &self.rows {
            table += &format!(
                "  {:<24}{:>9}{:>9}{:>9}{:>8}{:>9}{:>9}",
                row.name,
                duration(row.first_instruction_us),
                duration(row.first_beat_us),
                duration(row.done_us),
                row.demand_faults,
                row.traffic.requests,
                size(row.traffic.bytes >> 10 << 10)
            );
            table += &match &row.working_set {
                Some(set) => {
                    format!("{:>7}{:>6}{:>7}{:>7}\n", set.hits, set.late, set.misses, set.waste)
                }
                None => "\n".into(),
            };
        }
        for note in self.notes() {
            table += &format!("  {note}\n");
        }
        for Target { name, measured, bound, at_most, met } in &self.targets {
            let (verdict, least) = (if *met { "met" } else { "missed" }, ["at least", "at most"]);
            let least = least[usize::from(*at_most)];
            table += &format!("  {verdict:<7} {name}: {measured:.1}; target: {least} {bound}\n");
        }
        table
    }
}

impl DistanceReport {
    /// Returns the conditions under which the figures came about.
    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "runs, beats, done: from demand-vmm's start to the guest's first instruction, its first"
                .to_string(),
            "beat and the end of its task; faults: accesses that waited for a page, with a working"
                .to_string(),
            "set also those after the task; requests, fetched: GETs of the store, and their answers"
                .to_string(),
        ];
        let find = |name| self.rows.iter().find(|row| row.name == name);
        if let (Some(demand), Some(around), Some(replay)) =
            (find(DEMAND), find(AROUND), find(REPLAY))
        {
            let own = |row: &Row| row.first_beat_us.saturating_sub(row.first_instruction_us);
            notes.push(format!(
                "from the first instruction on, replay beats {:.1} and {:.1} times sooner",
                ratio(own(demand), own(replay)),
                ratio(own(around), own(replay))
            ));
            if let Some(local) = find(LOCAL) {
                let more = |row: &Row| row.first_beat_us.saturating_sub(local.first_beat_us);
                notes.push(format!(
                    "the distance costs the first beat {} on demand only, {} with fetch-around, and \
                     {} with replay",
                    duration(more(demand)),
                    duration(more(around)),
                    duration(more(replay))
                ));
            }
        }
        if self.place == LAB {
            notes.push(
                "the lab's processor is emulated, tens of times slower than a real one; its link is \
                 not"
                .to_string(),
            );
        }
        notes
    }
}

fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to.max(1) as f64
}

/// Judges restores by the targets of working sets.
fn targets(rows: &[Row]) -> Vec<Target> {
    let find = |name| rows.iter().find(|row| row.name == name);
    let set_of = |name| find(name).and_then(|row| row.working_set.clone());
    let (Some(demand), Some(around), Some(replay)) = (find(DEMAND), find(AROUND), find(REPLAY))
    else {
        return Vec::new();
    };
    let (Some(recorded), Some(again)) = (find(RECORDED), set_of(AGAIN)) else { return Vec::new() };
    let sooner = |than: &Row| ratio(than.first_beat_us, replay.first_beat_us);
    vec![
        Target::at_least(
            "repeated demand faults gone, %",
            100.0 - 100.0 * ratio(replay.demand_faults, recorded.demand_faults),
            97.0,
        ),
        Target::at_least("first beat sooner than demand only, times", sooner(demand), 20.0),
        Target::at_least("first beat sooner than fetch-around, times", sooner(around), 4.0),
        Target::at_most(
            "pages replayed in vain, %",
            100.0 * ratio(again.waste, again.replayed_pages),
            15.0,
        ),
    ]
}

/// A line of the process that restores the guests, for the one that shows them and has the link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// A step, for people.
    Step(String),
    /// A restore begins; no request is in flight.
    Begins,
    /// The guest has ended its task: the traffic since the beginning is the row's.
    Done,
    /// The row, without its traffic, once the guest has verified all of its work and ended.
    Verified(Row),
}

/// The environment of the restores: its inputs and its listener.
#[allow(missing_debug_implementations, reason = "it borrows a closure")]
pub struct Stage<'a> {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// A folder for this stage only.
    pub folder: &'a Path,
    /// The URL of the server, without the link, to push the snapshot to. The environment has the
    /// other one, and the credentials.
    pub direct: &'a str,
    /// Receives each message, at once.
    pub tell: &'a mut dyn FnMut(&Message),
}

/// The work of a restored guest until it is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// It verifies and rewrites all the pages that it works on, once.
    Round,
    /// It reboots after its first beat, which the recorded guests did not.
    Reboot,
}

/// A restore, and its options.
struct Restore<'a> {
    name: &'a str,
    from: &'a str,
    options: &'a [&'a str],
    task: Task,
    /// Time for which the first touches are noted, if they are.
    noted: Duration,
}

/// Takes the snapshot, pushes it, and restores it in each way.
///
/// # Errors
///
/// If a step fails, or a guest finds a wrong byte.
pub fn run(stage: Stage<'_>) -> Result<()> {
    let Stage { kernel, folder, direct, tell } = stage;
    let mut step = |text: String| tell(&Message::Step(text));
    let at = |name: &str| folder.join(name);
    step(format!("booting Linux in {} of memory, with 2 vCPUs", size(MEMORY)));
    let config = GuestConfig { cpus: 2, memory: format!("size={MEMORY}"), ..Default::default() };
    let work = Work::Prove(Prove {
        memory: WORKED_ON,
        journal: Journal::None,
        rest_us: REST_US,
        beat_ms: BEAT_MS,
        ..Prove::default()
    });
    let mut guest = Guest::boot(&at("first"), &kernel, &work, &config)?;
    let mut seen = guest.wait_beats(6)?;
    let snapshot = at("snapshot");
    let taken = guest.snapshot(&snapshot, Some(Go::Pause))?;
    seen = guest.last_beat()?.unwrap_or(seen);
    guest.kill();
    let begun = Instant::now();
    let mut push = Command::new(program("demand-vmm")?);
    push.args(["image", "push", "--compress", "lz4"]).arg(&snapshot).arg(SNAPSHOT);
    succeed(push.env("AWS_ENDPOINT_URL", direct))?;
    step(format!(
        "its snapshot, {} of content, is pushed after {}; it is restored with an empty cache each time",
        size(taken.data_pages * 4096),
        duration(micros(begun.elapsed()))
    ));
    let local = snapshot.to_str().context("the folder's name is no UTF-8")?;
    let until = seen.pages + WORKED_ON / 4096;
    let mut restore = |name, from, task, options: &[&str], noted| {
        let restore = Restore { name, from, options, task, noted };
        run_one(&at("restored"), &restore, until, tell)
    };
    let none = Duration::ZERO;
    restore(LOCAL, local, Task::Round, &["--lazy", "off"], none)?;
    let off = ["--fill", "off", "--fetch-around", "off"];
    restore(DEMAND, SNAPSHOT, Task::Round, &off, none)?;
    let took = restore(AROUND, SNAPSHOT, Task::Round, &["--fill", "off"], none)?;
    // Touches are noted for a time, by whose end the guest must have ended its task.
    let seconds = took.as_secs() * 5 / 4 + 1;
    let mut restore = |name, task, mode: &str| {
        let (set, noted) = (format!("{mode},seconds={seconds}"), Duration::from_secs(seconds));
        restore(name, SNAPSHOT, task, &["--fill", "off", "--working-set", &set], noted)
    };
    restore(RECORDED, Task::Round, "record")?;
    restore(REPLAY, Task::Round, "replay")?;
    restore(AGAIN, Task::Round, "auto")?;
    restore("replay, and once more", Task::Round, "auto")?;
    restore("replay of three records", Task::Round, "replay")?;
    restore("replay, guest reboots", Task::Reboot, "replay")?;
    Ok(())
}

/// Restores the guest, lets it do its task, and measures it. Lets it verify its work and end, once
/// its working set is recorded. Returns the time that its task took.
fn run_one(
    folder: &Path,
    restore: &Restore<'_>,
    until: u64,
    tell: &mut dyn FnMut(&Message),
) -> Result<Duration> {
    let Restore { name, from, options, task, noted } = *restore;
    // A fresh cache for each.
    let _ = std::fs::remove_dir_all(folder);
    let mut more: Vec<_> = options.iter().map(ToString::to_string).collect();
    if from == SNAPSHOT {
        more.extend(["--cache".into(), format!("{},{CACHE}", folder.join("cache").display())]);
    }
    let config = GuestConfig { more, ..GuestConfig::default() };
    tell(&Message::Begins);
    let begun = Instant::now();
    let mut guest = Guest::restore(folder, Path::new(from), &config)?;
    let mut beat = guest.wait_beats(1)?;
    let mut row =
        Row { name: name.into(), first_beat_us: micros(begun.elapsed()), ..Row::default() };
    match task {
        Task::Round => {
            while beat.pages < until {
                beat = guest.wait_beats(1)?;
            }
        }
        Task::Reboot => {
            guest.type_line("reset")?;
            guest.wait_ready()?;
        }
    }
    let took = begun.elapsed();
    row.done_us = micros(took);
    // A page that is touched before the notes end did not come in vain.
    let first = Duration::from_micros(row.first_beat_us);
    while !noted.is_zero() && begun.elapsed() < first + noted {
        guest.wait_beats(1)?;
    }
    let (metrics, status) = (guest.api().metrics()?, guest.api().status()?);
    row.working_set = status.working_set;
    row.demand_faults = match &row.working_set {
        // Pages that have arrived may be held, and take a fault that waits for nothing.
        Some(set) => set.late + set.misses,
        None => faults(&metrics),
    };
    tell(&Message::Done);
    wait_recorded(&guest)?;
    let (_, _, report) = guest.finish()?;
    row.first_instruction_us = report.time_to_first_instruction_us;
    let set = report.working_set.unwrap_or_default();
    ensure!(set.error.is_none() && set.failed_frames == 0, "{name}: {set:?}");
    thread::sleep(QUIET);
    tell(&Message::Verified(row));
    Ok(took)
}

/// Waits until the working set is written, if one is recorded.
fn wait_recorded(guest: &Guest) -> Result<()> {
    let begun = Instant::now();
    loop {
        let set = guest.api().status()?.working_set;
        let Some(set) = set.filter(|set| matches!(set.mode.as_str(), "record" | "auto")) else {
            return Ok(());
        };
        if let Some(error) = set.error {
            bail!("{error}");
        }
        if set.recorded_pages > 0 {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "no working set is recorded; {}", guest.story());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Returns the number of accesses to missing pages, of all paths, from a VM's metrics.
fn faults(metrics: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with("demand_vmm_faults_total{"));
    let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok());
    lines.filter_map(value).sum()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, first_beat_us: u64, demand_faults: u64, set: Option<[u64; 2]>) -> Row {
        let working_set = set.map(|[replayed_pages, waste]| WorkingSetReport {
            replayed_pages,
            waste,
            ..WorkingSetReport::default()
        });
        Row { name: name.into(), first_beat_us, demand_faults, working_set, ..Row::default() }
    }

    fn rows() -> Vec<Row> {
        vec![
            row(LOCAL, 90_000, 0, None),
            row(DEMAND, 2_000_000, 900, None),
            row(AROUND, 400_000, 800, None),
            row(RECORDED, 450_000, 1000, Some([0, 0])),
            row(REPLAY, 100_000, 30, Some([1000, 500])),
            row(AGAIN, 110_000, 40, Some([1000, 150])),
        ]
    }

    #[test]
    fn targets_are_met_at_their_bounds() {
        let report = DistanceReport::new(LAB, ROUND_TRIP, rows());
        let measured: Vec<_> = report.targets.iter().map(|target| target.measured).collect();
        assert_eq!(measured, [97.0, 20.0, 4.0, 15.0]);
        assert!(report.targets.iter().all(|target| target.met), "{:?}", report.targets);
        let text = report.table();
        assert!(text.contains("met     pages replayed in vain, %: 15.0; target: at most 15\n"));
        assert!(text.contains("beats 20.0 and 4.0 times sooner"), "{text}");
        assert!(text.contains("1910 ms on demand only, 310 ms with fetch-around"), "{text}");
        assert!(text.contains("emulated"), "{text}");
    }

    #[test]
    fn missed_targets_are_called_missed() {
        let mut rows = rows();
        rows[4].first_beat_us = 101_000;
        rows[4].demand_faults = 31;
        rows[5].working_set = row("", 0, 0, Some([1000, 151])).working_set;
        let report = DistanceReport::new("host", ROUND_TRIP, rows);
        assert!(report.targets.iter().all(|target| !target.met), "{:?}", report.targets);
        let text = report.table();
        assert_eq!(text.matches("  missed ").count(), 4, "{text}");
        assert!(!text.contains("emulated"), "{text}");
    }

    #[test]
    fn other_distances_have_no_targets() {
        let report = DistanceReport::new(LAB, ROUND_TRIP * 5, rows());
        assert_eq!((report.round_trip_us, report.targets), (50_000, Vec::new()));
    }

    #[test]
    fn missing_rows_judge_nothing() {
        for left_out in [DEMAND, AROUND, RECORDED, REPLAY, AGAIN] {
            let mut rows = rows();
            rows.retain(|row| row.name != left_out);
            assert_eq!(DistanceReport::new(LAB, ROUND_TRIP, rows).targets, [], "{left_out}");
        }
    }

    #[test]
    fn faults_of_all_paths_are_added() {
        let metrics = "# TYPE demand_vmm_faults counter\n\
            demand_vmm_faults_total{path=\"guest\",mapped_bytes=\"4096\"} 3\n\
            demand_vmm_faults_total{path=\"vmm\",mapped_bytes=\"4096\"} 2\n\
            demand_vmm_fault_seconds_count{path=\"guest\"} 3\n";
        assert_eq!(faults(metrics), 5);
    }
}
