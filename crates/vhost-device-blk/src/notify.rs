// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages to the service manager (sd_notify). Without `NOTIFY_SOCKET`, nothing is sent.

use sd_notify::NotifyState;

/// The daemon listens.
pub(crate) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The daemon's present work.
pub(crate) fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The daemon ends.
pub(crate) fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("cannot notify the service manager (NOTIFY_SOCKET): {error}");
    }
}
