// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main loop of a running VM: serves its console, watches its back-ends, and handles the events
//! of its threads until the VM ends.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use crate::api::events::EventKind;
use crate::devices::power::PowerRequest;
use crate::devices::terminal::{Keys, Typed};
use crate::error::Error;
use crate::vcpu::VcpuEvent;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::Vm;
use crate::vm::absence::AbsenceWatch;
use crate::vm::error::VmError;
use crate::vm::events::{Event, EventReceiver};
use crate::vm::halt_watch::HaltWatch;
use crate::vm::task::spawn;

/// Interval of the main loop's polls, in milliseconds.
const LOOK_EVERY_MS: i32 = 200;

/// The way in which a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitReason {
    /// The guest has powered off.
    Off,
    /// The guest has asked for a reset.
    Reset,
    /// The guest's kernel has panicked. It may still run.
    Panicked,
    /// A client of the API, a signal, or the user at the terminal has asked for the end.
    Asked,
}

/// The file descriptors that the main loop watches, and the state of their handlers.
struct Descriptors {
    receiver: Arc<vmm_sys_util::eventfd::EventFd>,
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
        let mut fds =
            vec![(self.receiver.as_raw_fd(), EventSet::IN), (room.as_raw_fd(), EventSet::IN)];
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
        if fd == self.receiver.as_raw_fd() {
            let _ = self.receiver.read();
        } else if fd == self.vm.chipset.serial.room().as_raw_fd() {
            let _ = self.vm.chipset.serial.room().read();
            self.type_in(ops);
        } else if let Some((_, device)) = self.back_ends.iter().find(|(other, _)| *other == fd) {
            if let Err(error) = device.check_alive() {
                let kind = EventKind::BackEndDisconnected { error: error.to_string() };
                self.vm.log.add(kind);
                self.lost.get_or_insert(error.into());
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
/// Returns a one-line error if a vCPU cannot continue, a back-end is gone, or demand paging cannot
/// be removed.
pub(crate) fn follow_events(
    vm: &Arc<Vm>,
    receiver: &EventReceiver,
    console: bool,
    mut look: impl FnMut(Option<Instant>),
) -> Result<ExitReason, Error> {
    let failed = |source| VmError::EventLoop { source };
    let mut manager = EventManager::new().map_err(failed)?;
    let back_ends = vm.devices.iter().map(|device| (device.as_raw_fd(), device.clone()));
    let watched = manager.add_subscriber(Descriptors {
        receiver: receiver.wake().clone(),
        vm: vm.clone(),
        back_ends: back_ends.collect(),
        keys: console.then(Keys::new),
        typed: VecDeque::new(),
        quit: false,
        lost: None,
    });
    let (mut absences, mut halts) = (AbsenceWatch::new(), HaltWatch::new());
    loop {
        manager.run_with_timeout(LOOK_EVERY_MS).map_err(failed)?;
        vm.look_at_source();
        absences.look(vm);
        halts.look(vm);
        while let Some(event) = receiver.next() {
            if matches!(event, Event::Complete) {
                look(Some(Instant::now()));
            }
            if let Some(end) = on_event(vm, event)? {
                return Ok(end);
            }
        }
        let descriptors = manager.subscriber_mut(watched).map_err(failed)?;
        if let Some(error) = descriptors.lost.take() {
            return Err(error);
        }
        if descriptors.quit {
            return Ok(ExitReason::Asked);
        }
        look(None);
    }
}

fn on_event(vm: &Arc<Vm>, event: Event) -> Result<Option<ExitReason>, Error> {
    match event {
        Event::Power(PowerRequest::Off) => return Ok(Some(ExitReason::Off)),
        Event::Power(PowerRequest::Reset) => return Ok(Some(ExitReason::Reset)),
        Event::Power(PowerRequest::Panicked) => return Ok(Some(ExitReason::Panicked)),
        Event::Shutdown => return Ok(Some(ExitReason::Asked)),
        Event::Vcpu(VcpuEvent::Failed { error, .. }) => return Err(VmError::Vcpu(error).into()),
        // The thread was not told to stop and has not reported an error, so it has panicked.
        Event::Vcpu(VcpuEvent::Ended { cpu }) => {
            return Err(VmError::VcpuPanicked { cpu }.into());
        }
        Event::Complete => finish(vm)?,
        Event::Finished(outcome) => {
            outcome?;
            vm.log.add(EventKind::PagingComplete);
        }
        Event::GivenUp(reason) => vm.give_up(reason)?,
        Event::Reset(outcome) => outcome?,
    }
    Ok(None)
}

/// Removes demand paging on a separate thread, because that waits for the back-ends.
fn finish(vm: &Arc<Vm>) -> Result<(), Error> {
    let vm = vm.clone();
    spawn("finish", move || vm.events.send(Event::Finished(vm.finish_paging())))
}
