// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main loop of a running VM: serves its console, watches its back-ends, and handles the events
//! of its threads until the VM ends.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use crate::devices::power::PowerRequest;
use crate::devices::terminal::{Keys, Typed};
use crate::error::{Error, no_thread};
use crate::vcpu::VcpuEvent;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::Vm;
use crate::vm::absence::AbsenceWatch;
use crate::vm::events::{Event, Hear};
use crate::vm::halt_watch::HaltWatch;

/// Interval of the main loop's polls, in milliseconds.
const LOOK_EVERY_MS: i32 = 200;

/// The way in which a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest has powered off.
    Off,
    /// The guest has asked for a reset.
    Reset,
    /// The guest's kernel has panicked. It may still run.
    Panicked,
    /// A client of the API, or the user at the terminal, has asked for the end.
    Asked,
}

/// The file descriptors that the main loop watches, and the state of their handlers.
struct Descriptors {
    hear: Arc<vmm_sys_util::eventfd::EventFd>,
    vm: Arc<Vm>,
    back_ends: Vec<(RawFd, Arc<VhostUserDevice>)>,
    /// Standard input, if it is the guest's console.
    keys: Option<Keys>,
    /// Typed bytes for which the guest has no room yet.
    typed: VecDeque<u8>,
    quit: bool,
    lost: Option<Error>,
}

impl Descriptors {
    fn stdin() -> RawFd {
        io::stdin().as_raw_fd()
    }

    /// Passes typed bytes on to the guest. Standard input is not read while the guest has no room.
    fn type_in(&mut self, ops: &mut EventOps<'_>) {
        while !self.typed.is_empty() {
            let taken = self.vm.chipset.serial.type_in(self.typed.make_contiguous());
            self.typed.drain(..taken);
            if taken == 0 {
                return;
            }
        }
        if self.keys.is_some() {
            // This fails if the loop already watches it.
            let _ = ops.add(Events::new_raw(Self::stdin(), EventSet::IN));
        }
    }

    fn read_keys(&mut self, ops: &mut EventOps<'_>) {
        let Some(keys) = &mut self.keys else { return };
        match keys.read() {
            Ok(Typed::Bytes(bytes)) => self.typed.extend(bytes),
            Ok(Typed::Quit) => self.quit = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Ok(Typed::End) | Err(_) => {
                self.keys = None;
                let _ = ops.remove(Events::empty_raw(Self::stdin()));
                return;
            }
        }
        let _ = ops.remove(Events::empty_raw(Self::stdin()));
        self.type_in(ops);
    }
}

impl MutEventSubscriber for Descriptors {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let room = self.vm.chipset.serial.room().clone();
        let mut fds = vec![(self.hear.as_raw_fd(), EventSet::IN), (room.as_raw_fd(), EventSet::IN)];
        // Hang-ups only: a back-end sends only replies, and the requesting thread reads those.
        fds.extend(self.back_ends.iter().map(|(fd, _)| (*fd, EventSet::READ_HANG_UP)));
        for (fd, set) in fds {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                log::error!("cannot watch a descriptor of the VM: {error:?}");
            }
        }
        // epoll accepts no regular file, and standard input may be closed. Neither carries
        // keystrokes.
        if self.keys.is_some() && ops.add(Events::new_raw(Self::stdin(), EventSet::IN)).is_err() {
            self.keys = None;
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.hear.as_raw_fd() {
            let _ = self.hear.read();
        } else if fd == self.vm.chipset.serial.room().as_raw_fd() {
            let _ = self.vm.chipset.serial.room().read();
            self.type_in(ops);
        } else if let Some((_, device)) = self.back_ends.iter().find(|(other, _)| *other == fd) {
            if let Err(error) = device.check_alive() {
                self.lost.get_or_insert(error);
                let _ = ops.remove(Events::empty_raw(fd));
            }
        } else if fd == Self::stdin() {
            self.read_keys(ops);
        }
    }
}

/// Runs the main loop until the VM ends. `console` says whether standard input is the guest's
/// console. `look` is called at each poll, and with the current time when the last page becomes
/// present.
///
/// # Errors
///
/// Returns a one-line error if a vCPU cannot continue, a back-end is gone, demand paging cannot be
/// removed, or the process was asked to end.
pub(crate) fn drive(
    vm: &Arc<Vm>,
    hear: &Hear,
    console: bool,
    mut look: impl FnMut(Option<Instant>),
) -> Result<End, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::host(format!(
            "cannot watch the VM's descriptors: {error}; raise the limit of open files \
             (ulimit -n)"
        ))
    };
    let mut manager = EventManager::new().map_err(|error| failed(&error))?;
    let back_ends = vm.devices.iter().map(|device| (device.as_raw_fd(), device.clone()));
    let watched = manager.add_subscriber(Descriptors {
        hear: hear.wake().clone(),
        vm: vm.clone(),
        back_ends: back_ends.collect(),
        keys: console.then(Keys::new),
        typed: VecDeque::new(),
        quit: false,
        lost: None,
    });
    let (mut absences, mut halts) = (AbsenceWatch::new(), HaltWatch::new());
    loop {
        manager.run_with_timeout(LOOK_EVERY_MS).map_err(|error| failed(&error))?;
        absences.look(vm);
        halts.look(vm);
        while let Some(event) = hear.next() {
            if matches!(event, Event::Complete) {
                look(Some(Instant::now()));
            }
            if let Some(end) = on_event(vm, event)? {
                return Ok(end);
            }
        }
        let descriptors = manager.subscriber_mut(watched).map_err(|error| failed(&error))?;
        if let Some(error) = descriptors.lost.take() {
            return Err(error);
        }
        if descriptors.quit {
            return Ok(End::Asked);
        }
        look(None);
    }
}

fn on_event(vm: &Arc<Vm>, event: Event) -> Result<Option<End>, Error> {
    match event {
        Event::Power(PowerRequest::Off) => return Ok(Some(End::Off)),
        Event::Power(PowerRequest::Reset) => return Ok(Some(End::Reset)),
        Event::Power(PowerRequest::Panicked) => return Ok(Some(End::Panicked)),
        Event::Shutdown => return Ok(Some(End::Asked)),
        Event::Interrupted => return Err(Error::failed("the VM was interrupted")),
        Event::Vcpu(VcpuEvent::Failed { message, .. }) => return Err(Error::failed(message)),
        // The thread was not told to stop and has not reported an error, so it has panicked.
        Event::Vcpu(VcpuEvent::Ended { cpu }) => {
            return Err(Error::failed(format!(
                "vCPU {cpu} stopped: its thread has panicked; see its message above"
            )));
        }
        Event::Complete => finish(vm)?,
        Event::Finished(outcome) => outcome?,
        Event::GivenUp(reason) => vm.give_up(reason)?,
        Event::Reset(outcome) => outcome?,
    }
    Ok(None)
}

/// Removes demand paging on a separate thread, because that waits for the back-ends.
fn finish(vm: &Arc<Vm>) -> Result<(), Error> {
    let vm = vm.clone();
    spawn("finish", move || vm.tell.tell(Event::Finished(vm.finish_paging())))
}

/// Runs `work` on a new thread.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let spawned = thread::Builder::new().name(name.into()).spawn(work);
    spawned.map(drop).map_err(|error| no_thread("run a task of the VM", error))
}
