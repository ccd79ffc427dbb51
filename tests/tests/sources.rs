// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests whose page sources are killed and started again while pages arrive: web and NBD servers,
//! pagers, and another VM that fetches into the same cache. Each is a pause, no more: the memory
//! that arrives is the snapshot's, and nothing is left behind in the VMM.
//!
//! `SOURCES_KILLS` gives the number of kills of each kind (`rust-vmm-ci/soak --sources`), and
//! `SOURCES_SEED` the seed of their moments; by default there is one of each.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use demand_tests::cannot_run;
use demand_tests::host::skip;
use demand_tests::page_server::PageServer;
use demand_tests::process::{Guarded, program};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::{Go, SnapshotRequest, State};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use test_support::servers::Web;
use test_support::wait::until;

/// Number of kills from which on it is checked that none leaves a descriptor or a thread.
const MANY: u64 = 9;

/// Bytes of content that the fill brings.
const CONTENT: usize = 24 << 20;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

/// A restored guest, and the lines of its standard error.
struct Restored {
    vmm: Guarded,
    lines: Receiver<String>,
}

impl Restored {
    fn start(snapshot: &TinySnapshot, kind: &Kind) -> Result<Restored> {
        let mut restore = snapshot.restore_from(&kind.source, &[])?;
        restore.args(options(kind.cache.as_deref()));
        restore.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut vmm = Guarded::spawn(&mut restore)?;
        let (sender, lines) = channel();
        let pipe = BufReader::new(vmm.child().stderr.take().expect("a pipe"));
        thread::spawn(move || {
            pipe.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        snapshot.wait_running();
        Ok(Restored { vmm, lines })
    }

    /// Returns the numbers of its descriptors and of its threads.
    fn held(&self) -> Result<[u64; 2]> {
        let folder = |what| fs::read_dir(format!("/proc/{}/{what}", self.vmm.id()));
        Ok([folder("fd")?.count() as u64, folder("task")?.count() as u64])
    }

    /// Prints the lines so far.
    fn print_lines(&self) {
        loop {
            match self.lines.try_recv() {
                Ok(line) => println!("    {line}"),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }
}

/// A kind of server, and how a restore uses it.
struct Kind {
    server: PageServer,
    /// The value of `--source`.
    source: String,
    /// The folder of a host cache, which is empty at the beginning of each restore.
    cache: Option<PathBuf>,
}

impl Kind {
    fn new(server: PageServer, source: String) -> Kind {
        Kind { server, source, cache: None }
    }
}

/// Returns the options with which a VM uses a host cache, and has pages missing for a while.
fn options(cache: Option<&Path>) -> Vec<String> {
    let mut options: Vec<_> = ["--serial", "off", "--fill", "rate=8M"].map(str::to_owned).into();
    if let Some(folder) = cache {
        options.extend(["--cache".to_owned(), format!("{},size=1G", folder.display())]);
    }
    options
}

/// Restores a guest from a server that is killed while pages are missing, up to `most` times.
/// Returns the number of kills.
fn outlasts(
    snapshot: &TinySnapshot,
    kind: &mut Kind,
    most: u64,
    random: &mut StdRng,
) -> Result<u64> {
    let mut pause = |most_ms| thread::sleep(Duration::from_millis(random.random_range(0..most_ms)));
    kind.server.kill();
    kind.cache.iter().filter(|folder| folder.exists()).try_for_each(fs::remove_dir_all)?;
    kind.server.restart()?;
    let mut guest = Restored::start(snapshot, kind)?;
    let before = guest.held()?;
    let mut kills = 0;
    loop {
        pause(400);
        let status = snapshot.api().status()?;
        assert_eq!(status.state, State::Running, "{status:?}");
        if kills == most || status.pages_present == status.pages_total {
            break;
        }
        kind.server.kill();
        kills += 1;
        pause(400);
        kind.server.restart()?;
    }
    until("all pages are present", || {
        let status = snapshot.api().status().unwrap();
        status.pages_present == status.pages_total
    });
    // A leak at each kill would add up; idle connections and threads end after a while.
    let (most, begun) = (before.map(|held| held + kills / 3), Instant::now());
    let mut after = guest.held()?;
    while kills >= MANY && (after[0] > most[0] || after[1] > most[1]) {
        assert!(begun.elapsed() < Duration::from_secs(120), "{after:?} is held, before {before:?}");
        thread::sleep(Duration::from_secs(1));
        after = guest.held()?;
    }
    println!("{}: {kills} kills; held: {before:?}, then {after:?}", kind.source);
    guest.print_lines();
    let copy = snapshot.at("copy");
    let request = SnapshotRequest { destination: copy.clone(), then: Some(Go::Shutdown) };
    snapshot.api().snapshot(&request, |_| {})?;
    assert!(guest.vmm.wait(Duration::from_secs(60))?.success());
    snapshot.expect_memory_of(&copy)?;
    fs::remove_dir_all(copy)?;
    kind.server.kill();
    Ok(kills)
}

/// Returns all kinds, of which at most one is to be started at a time.
fn kinds(snapshot: &TinySnapshot) -> Result<Vec<Kind>> {
    let (dir, socket) = (snapshot.dir(), snapshot.at("source.sock"));
    let at = |scheme, more: &str| format!("{scheme}{}{more}", socket.display());
    let files = format!("?files={}", dir.display());
    let pushed = snapshot.push()?;
    let mut kinds = Vec::new();
    if let Some(web) = Web::start(&snapshot.at("store"), "") {
        let source = web.url("vm7");
        kinds.push(Kind::new(PageServer::Web(web), source));
    }
    if let Some(server) = PageServer::nbdkit(&dir, &socket) {
        kinds.push(Kind::new(server, at("nbd+unix:///?socket=", "")));
    }
    // It has all files; the others have the memory.
    kinds.push(Kind::new(PageServer::pager(&dir, &socket)?, at("pager:", "")));
    if let Some(server) = PageServer::python_pager(&dir, &socket) {
        kinds.push(Kind::new(server, at("pager:", &files)));
    }
    let handler = PageServer::firecracker_handler(&dir, &socket)?;
    kinds.push(Kind::new(handler, at("pager+firecracker:", &files)));
    // Another VM, which is killed with its claims on chunks.
    let (cache, url, api) = (snapshot.at("cache"), pushed.clone(), snapshot.at("other.sock"));
    let (demand_vmm, options) = (program("demand-vmm")?, options(Some(&cache)));
    let owner = PageServer::new(move || {
        let mut command = Command::new(&demand_vmm);
        command.args(["restore", "--log-level", "off", "--source", &url]).args(&options);
        command.arg("--api-socket").arg(&api);
        command
    });
    kinds.push(Kind { server: owner, source: pushed, cache: Some(cache) });
    Ok(kinds)
}

#[test]
fn guests_outlast_killed_sources() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    snapshot.enlarge(&TinySnapshot::content(CONTENT)).unwrap();
    let (kills, seed) = (number("SOURCES_KILLS").unwrap_or(1), number("SOURCES_SEED"));
    let mut random = StdRng::seed_from_u64(seed.unwrap_or(1));
    for mut kind in kinds(&snapshot).unwrap() {
        let mut left = kills;
        while left > 0 {
            let kills = outlasts(&snapshot, &mut kind, left, &mut random);
            left -= kills.unwrap_or_else(|error| panic!("{}: {error:#}", kind.source));
        }
    }
}
