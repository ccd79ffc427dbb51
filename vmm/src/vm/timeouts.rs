// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The time limits of a VM's operations, side by side.
//!
//! An end must be shorter than the patience of the process that ends: each limit of an end is
//! about two seconds, and a signal ends the process after at most three times [`SIGNAL`].

use std::time::Duration;

/// Limit of a pause, and of the pause for a snapshot: all vCPUs leave the guest.
pub(crate) const PAUSE: Duration = Duration::from_secs(10);
/// Limit of a snapshot: the states of all vCPUs are saved.
pub(crate) const SAVE: Duration = Duration::from_secs(10);
/// Limit of a snapshot, for each device: its requests in flight are answered.
pub(crate) const DRAIN: Duration = Duration::from_secs(10);
/// Limit of a restore: the states of all vCPUs are set.
pub(crate) const RESTORE: Duration = Duration::from_secs(60);

/// How long an end waits for a snapshot in progress while pages still arrive; after that it ends
/// every wait for a page or a back-end.
pub(crate) const END: Duration = Duration::from_secs(2);
/// How long an end waits for the vCPUs to leave the guest while pages still arrive, and once more
/// after the guest's memory was revoked.
pub(crate) const VCPUS: Duration = Duration::from_secs(2);
/// How long an end waits until the guest's last console output is written.
pub(crate) const CONSOLE: Duration = Duration::from_secs(1);
/// How long an end waits until the working set of the run is recorded.
#[cfg(feature = "remote")]
pub(crate) const WORKING_SET: Duration = Duration::from_millis(1500);
/// How long an end that a signal requests waits for the VM while pages still arrive, again after
/// its memory was stopped, and again after it was revoked.
pub(crate) const SIGNAL: Duration = Duration::from_millis(2500);
