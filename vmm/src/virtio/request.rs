// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests for which a device waits, and the warning about a wait that has become long.

use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use crate::patience::{PATIENCE, Wait};
use crate::sync::LockExt;

/// A request that a back-end has not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// The connection and the negotiation of features.
    Negotiate,
    /// The memory table, and the beginning of post-copy.
    TakeMemory,
    /// The start of the device for the guest's driver.
    Start,
    /// The stop of the device for the guest's driver.
    Stop,
    /// The stop of a queue for the guest's driver.
    StopQueue,
    /// A read of the config space.
    ReadConfig,
    /// A write to the config space.
    WriteConfig,
    /// The stop for a snapshot.
    Quiesce,
    /// The start after a snapshot, or of a restored device.
    Resume,
    /// The end of post-copy.
    EndPostcopy,
}

impl Request {
    /// Returns the hint for a back-end that does not answer.
    fn hint(self) -> &'static str {
        match self {
            Request::Negotiate | Request::TakeMemory => {
                "if it serves another front-end, start another back-end"
            }
            _ => "check its log, and that its storage responds",
        }
    }

    /// Begins a wait for the back-end of device `name` at `socket`. If the wait becomes long, the
    /// log says so, under `target`.
    pub(crate) fn wait(self, target: &str, name: &str, socket: &Path) -> Wait {
        let (target, name, socket) = (target.to_owned(), name.to_owned(), socket.to_owned());
        Wait::begin(PATIENCE, move || {
            log::warn!(
                target: &target,
                "device {name}: waiting for the back-end at {} to {self}; {}",
                socket.display(),
                self.hint()
            );
        })
    }
}

impl fmt::Display for Request {
    /// Writes the act of the back-end that answers the request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Request::Negotiate => "negotiate features",
            Request::TakeMemory => "take the memory",
            Request::Start => "start for the guest's driver",
            Request::Stop => "stop for the guest's driver",
            Request::StopQueue => "stop a queue for the guest's driver",
            Request::ReadConfig => "send its config space",
            Request::WriteConfig => "take a change of its config space",
            Request::Quiesce => "stop for a snapshot, with no request in flight",
            Request::Resume => "resume",
            Request::EndPostcopy => "end post-copy",
        })
    }
}

/// The request that a device waits for, if any.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<Option<Request>>);

impl Pending {
    /// Returns the request, without blocking.
    pub(crate) fn get(&self) -> Option<Request> {
        *self.0.lock_always()
    }

    /// Sets the request until the returned value is dropped, when `wait` ends, too.
    pub(crate) fn begin(&self, request: Request, wait: Wait) -> Waiting<'_> {
        let before = self.0.lock_always().replace(request);
        Waiting { pending: self, before, _wait: wait }
    }
}

/// A wait for a back-end. Dropping it ends the wait.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    pending: &'a Pending,
    /// The request of which this one is a part.
    before: Option<Request>,
    _wait: Wait,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.pending.0.lock_always() = self.before;
    }
}
