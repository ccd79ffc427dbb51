// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon: listens on a socket and forks a process for each front-end, one at a time.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;

use crate::child::{Child, Event, Parent};
use crate::counters::{Counters, Snapshot};
use crate::disk::{Disk, DiskOptions};
use crate::endpoint::{Listening, Socket};
use crate::error::{Error, Result};
use crate::options::{DeviceOptions, Options, Postcopy};
use crate::rate::OncePerSecond;
use crate::signals::{self, Signals};
use crate::stats::Stats;
use crate::{connection, notify, postcopy, relay};

/// The time that a front-end's process may take to end after SIGTERM before it is killed. Longer
/// than the time that the process gives its requests in flight.
const END_PATIENCE: Duration = Duration::from_secs(4);

/// The time that a front-end has to disconnect after the next one has connected. A process that is
/// replaced may still hold its connection for a moment, as in a child that it is starting.
const HANDOVER: Duration = Duration::from_millis(200);

/// The pause before the next attempt to serve a front-end, if the host had no process for it.
const RETRY: Duration = Duration::from_secs(1);

/// Serves `options.disk` on `options.socket`: until the first front-end has disconnected if
/// `options.once` or if the socket is a connection, otherwise until SIGTERM, SIGINT or SIGHUP.
/// Removes a socket that it created before it returns.
///
/// Blocks these signals and SIGUSR1, on which it reports the counters, and forks for each
/// front-end, so the process must have no other threads. Front-ends are served one at a time: the
/// connection of another one is closed.
///
/// # Errors
/// [`Error`]; a connection's own errors only if it is the last one.
pub fn serve(options: Options) -> Result<()> {
    expect_no_threads()?;
    let signals = Signals::block()?;
    let disk_options = DiskOptions {
        read_only: options.read_only,
        block_size: options.block_size,
        keep_space: options.keep_space,
        shared: options.share_disk,
    };
    let disk = Arc::new(Disk::open(&options.disk, &disk_options)?);
    let postcopy = offer_postcopy(options.postcopy)?;
    let counters = Arc::new(Counters::new(options.num_queues)?);
    let stats = Stats::new(counters.clone(), options.stats, options.stats_interval);
    stats.write()?;
    let device = DeviceOptions {
        num_queues: options.num_queues,
        queue_size: options.queue_size,
        threads: options.threads,
        write_cache: options.write_cache,
        serial: options.serial,
        postcopy,
        mem_slots: options.mem_slots,
    };
    let served = format!(
        "{}: {} bytes{}, queues: {} of up to {}, post-copy {}offered",
        options.disk.display(),
        disk.sectors() * 512,
        if options.read_only { ", read-only" } else { "" },
        device.num_queues,
        device.queue_size,
        if postcopy { "" } else { "not " },
    );
    let mut server = Server { signals, disk, counters, stats, device };
    match Socket::open(options.socket)? {
        Socket::Listening(socket) => {
            log::info!("listening on {}; serving {served}", socket.name());
            notify::ready(&format!("listening on {}", socket.name()));
            server.serve_all(&socket, options.once)
        }
        Socket::Connected(front_end) => {
            log::info!("serving the inherited connection; {served}");
            notify::ready("serving the inherited connection");
            server.serve_one(front_end)
        }
    }
}

/// Fails if the process has other threads: hardly anything is allowed in a forked child of a
/// process with several threads, because locks that the others hold stay locked.
fn expect_no_threads() -> Result<()> {
    let threads = fs::read_dir("/proc/self/task").map_err(Error::system("count threads"))?;
    match threads.count() {
        1 => Ok(()),
        count => Err(Error::Threads(count)),
    }
}

fn offer_postcopy(wish: Postcopy) -> Result<bool> {
    if wish == Postcopy::Off {
        return Ok(false);
    }
    match postcopy::probe() {
        Ok(()) => Ok(true),
        Err(error) if wish == Postcopy::Require => Err(Error::PostcopyUnavailable(error)),
        Err(error) => {
            log::warn!(
                "cannot offer PAGEFAULT (--postcopy on): {error}; {}, or use --postcopy off",
                error.advice()
            );
            Ok(false)
        }
    }
}

struct Server {
    signals: Signals,
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    stats: Stats,
    device: DeviceOptions,
}

/// How serving a front-end ended.
struct Served {
    /// The outcome of its connection. A connection that the daemon's end has ended did not fail.
    result: Result<()>,
    /// Whether the front-end's process accepted its connection.
    connected: bool,
    /// The signal that ended the daemon meanwhile.
    signal: Option<&'static str>,
}

impl Server {
    /// Serves one front-end after another.
    fn serve_all(&mut self, socket: &Listening, once: bool) -> Result<()> {
        let listener = &socket.listener;
        loop {
            if let Some(signal) = self.await_front_end(listener)? {
                return self.end(signal);
            }
            let served = Child::fork(|parent| {
                // SAFETY: this runs in the child, which drops nothing, so the descriptor has one
                // owner there. It is closed as soon as the connection is accepted, so that no
                // front-end connects to a daemon that has ended.
                let listener = unsafe { UnixListener::from_raw_fd(listener.as_raw_fd()) };
                self.serve_in_child(listener, parent)
            });
            let served = match served {
                Ok(child) => self.attend(child, Some(listener), None)?,
                Err(error) => Served { result: Err(error), connected: false, signal: None },
            };
            if served.signal.is_some() {
                return self.stats.write();
            }
            match self.stats.write() {
                Err(error) if once => return Err(error),
                // A failure to write counters does not justify refusing the next front-end.
                Err(error) => log::error!("{error}"),
                Ok(()) => {}
            }
            match served.result {
                result if once => return result,
                Err(error) => log::error!("{error}"),
                Ok(()) => {}
            }
            if !served.connected
                && let Some(signal) = self.pause(RETRY)?
            {
                // The front-end that could not be served is still pending.
                return self.end(signal);
            }
            notify::status(&format!("listening on {}", socket.name()));
        }
    }

    /// Serves the front-end of a connection that was inherited.
    fn serve_one(&mut self, front_end: UnixStream) -> Result<()> {
        let name = name_of(&front_end);
        let child =
            Child::fork(|parent| self.serve_in_child(relay::listener_for(front_end)?, parent))?;
        let served = self.attend(child, None, Some(name))?;
        self.stats.write().and(served.result)
    }

    fn serve_in_child(&self, listener: UnixListener, parent: &Parent) -> Result<()> {
        let (disk, counters) = (self.disk.clone(), self.counters.clone());
        connection::serve(listener, &self.signals, disk, counters, self.device.clone(), parent)
    }

    /// Waits for a front-end. Returns the signal if one comes first that ends the daemon.
    fn await_front_end(&mut self, listener: &UnixListener) -> Result<Option<&'static str>> {
        loop {
            let fds =
                [(listener.as_raw_fd(), libc::POLLIN), (self.signals.as_raw_fd(), libc::POLLIN)];
            let [incoming, signalled] = signals::poll(fds, self.stats.time_left())?;
            if let Some(signal) = self.take_signals(signalled != 0) {
                return Ok(Some(signal));
            }
            if incoming != 0 {
                return Ok(None);
            }
        }
    }

    /// Waits for some time. Returns the signal if one comes that ends the daemon.
    fn pause(&mut self, time: Duration) -> Result<Option<&'static str>> {
        let fds = [(self.signals.as_raw_fd(), libc::POLLIN)];
        let [signalled] = signals::poll(fds, Some(time))?;
        Ok(self.take_signals(signalled != 0))
    }

    /// Reports the counters if that is due, or if a signal asks for it. Returns the signal that
    /// ends the daemon, if there is one.
    fn take_signals(&mut self, signalled: bool) -> Option<&'static str> {
        self.stats.report_if_due();
        let taken = if signalled { self.signals.take() } else { Default::default() };
        if taken.stats {
            self.stats.report();
        }
        taken.end
    }

    fn end(&self, signal: &str) -> Result<()> {
        report_end(signal);
        self.stats.write()
    }

    /// Waits for the process of a front-end to end, and terminates it if this process receives a
    /// signal. Meanwhile it refuses other front-ends on `listener`.
    fn attend(
        &mut self,
        mut child: Child,
        listener: Option<&UnixListener>,
        mut name: Option<String>,
    ) -> Result<Served> {
        let begun = Instant::now();
        let before = self.counters.snapshot();
        let mut connection: Option<UnixStream> = None;
        let mut refused = OncePerSecond::new();
        let mut leaving = false;
        let mut refuse_at: Option<Instant> = None;
        let mut signal = None;
        let mut deadline: Option<Instant> = None;
        let mut killed = false;
        loop {
            let watched = connection.is_some() && !leaving && refuse_at.is_none();
            let others = listener.filter(|_| watched).map_or(-1, AsRawFd::as_raw_fd);
            let until = deadline.into_iter().chain(refuse_at).min();
            let left = until.map(|it| it.saturating_duration_since(Instant::now()));
            let patience = left.into_iter().chain(self.stats.time_left()).min();
            let [changed, signalled, incoming] = signals::poll(
                [
                    (child.channel(), libc::POLLIN),
                    (self.signals.as_raw_fd(), libc::POLLIN),
                    (others, libc::POLLIN),
                ],
                patience,
            )?;
            if let Some(end) = self.take_signals(signalled != 0)
                && signal.is_none()
            {
                report_end(end);
                child.kill(libc::SIGTERM);
                signal = Some(end);
                leaving = true;
                deadline = Some(Instant::now() + END_PATIENCE);
            }
            if changed != 0 {
                match child.next_event()? {
                    Event::Connected(stream) => {
                        let name = name.get_or_insert_with(|| name_of(&stream));
                        self.counters.connected();
                        log::info!("{name} connected");
                        notify::status(&format!("serving {name}"));
                        connection = Some(stream);
                    }
                    Event::Ended => break,
                }
            }
            if deadline.is_some_and(|it| Instant::now() >= it) {
                log::warn!("cannot end the front-end's process: it does not stop; killing it");
                child.kill(libc::SIGKILL);
                killed = true;
                break;
            }
            if incoming != 0 {
                refuse_at = Some(Instant::now() + HANDOVER);
            }
            if let (Some(connection), Some(listener)) = (&connection, listener)
                && refuse_at.is_some_and(|it| Instant::now() >= it)
            {
                refuse_at = None;
                // The next front-end waits while the process of this one ends: it is not long.
                leaving = leaving || hung_up(connection)?;
                if !leaving {
                    refuse(listener, name.as_deref().unwrap_or_default(), &mut refused);
                }
            }
        }
        let connected = connection.is_some();
        let mut result = child.reap()?;
        if signal.is_some()
            && let Err(error) = std::mem::replace(&mut result, Ok(()))
            && !killed
        {
            log::error!("{error}");
        }
        if let Some(name) = name.filter(|_| connected) {
            let did = difference(&before, &self.counters.snapshot());
            log::info!("{name} disconnected after {:.1} s: {did}", begun.elapsed().as_secs_f64());
        }
        Ok(Served { result, connected, signal })
    }
}

fn report_end(signal: &str) {
    log::info!("ending on {signal}");
    notify::stopping(&format!("ending on {signal}"));
}

/// Returns a front-end's name for messages.
fn name_of(front_end: &UnixStream) -> String {
    match socket_peercred(front_end) {
        Ok(peer) => format!("front-end (process {})", peer.pid.as_raw_nonzero()),
        Err(_) => "front-end".into(),
    }
}

fn hung_up(connection: &UnixStream) -> Result<bool> {
    let fds = [(connection.as_raw_fd(), libc::POLLRDHUP)];
    let [events] = signals::poll(fds, Some(Duration::ZERO))?;
    Ok(events != 0)
}

/// Closes the connection of a front-end that is pending while another one is served.
fn refuse(listener: &UnixListener, served: &str, limit: &mut OncePerSecond) {
    let (name, advice) = match listener.accept() {
        Ok((other, _)) => (name_of(&other), "start another back-end for this one"),
        Err(error) => {
            log::error!("cannot refuse another front-end: {error}");
            std::thread::sleep(Duration::from_millis(100));
            return;
        }
    };
    if let Some(left_out) = limit.pass() {
        log::warn!("cannot serve {name}: busy with {served}; {advice}{left_out}");
    }
}

/// Returns the requests between two moments, in words.
fn difference(before: &Snapshot, after: &Snapshot) -> String {
    let of = |counter: fn(&Snapshot) -> u64| counter(after) - counter(before);
    format!(
        "{} requests, {} bytes read, {} bytes written, {} errors, {} faults waited, {} abandoned",
        of(|it| it.requests),
        of(|it| it.bytes_read),
        of(|it| it.bytes_written),
        of(|it| it.io_errors),
        of(|it| it.faults_waited),
        after.abandoned.saturating_sub(before.abandoned),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Endpoint;

    #[test]
    fn a_process_with_threads_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("s"));
        fs::write(&disk, [0; 4096]).unwrap();
        let options = Options {
            socket: Endpoint::Path(socket),
            disk,
            share_disk: false,
            num_queues: 1,
            queue_size: 256,
            threads: 1,
            read_only: false,
            block_size: None,
            keep_space: false,
            write_cache: true,
            serial: String::new(),
            postcopy: Postcopy::Off,
            mem_slots: false,
            once: false,
            stats: None,
            stats_interval: None,
        };
        // On a separate thread, so that a server that starts by mistake does not block the test.
        let (sender, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(serve(options)));
        let result = result.recv_timeout(Duration::from_secs(10)).expect("it does not begin");
        assert!(matches!(result, Err(Error::Threads(2..))), "{result:?}");
    }
}
