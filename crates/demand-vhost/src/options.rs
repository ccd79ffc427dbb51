// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of a connection to a back-end.

use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Options of a connection to a back-end: by default, without required or unused features, and with
/// a time limit of 30 seconds.
///
/// # Examples
///
/// ```
/// use demand_vhost::{Options, VhostUserProtocolFeatures};
/// use std::time::Duration;
///
/// let options = Options::default()
///     .needed(VhostUserProtocolFeatures::CONFIG)
///     .patience(Duration::from_secs(5));
/// # drop(options);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub(crate) needed: VhostUserProtocolFeatures,
    pub(crate) unused: VhostUserProtocolFeatures,
    pub(crate) patience: Duration,
}

impl Options {
    /// Requires these protocol features. Reading the device's configuration from the back-end needs
    /// `CONFIG`.
    #[must_use]
    pub fn needed(self, needed: VhostUserProtocolFeatures) -> Self {
        Options { needed, ..self }
    }

    /// Uses none of these protocol features, even if they are offered. Without `MQ` the back-end is
    /// not asked for its number of queues; for network cards some back-ends count queue pairs,
    /// others queues.
    #[must_use]
    pub fn unused(self, unused: VhostUserProtocolFeatures) -> Self {
        Options { unused, ..self }
    }

    /// Limits the time for an answer of the back-end. Time in which it waits for missing pages does
    /// not count.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Options { patience, ..self }
    }
}

impl Default for Options {
    fn default() -> Self {
        let none = VhostUserProtocolFeatures::empty();
        Options { needed: none, unused: none, patience: Duration::from_secs(30) }
    }
}
