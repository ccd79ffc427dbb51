// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a virtio device, and its limits.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::device_kind::{DeviceKind, MAX_QUEUE_SIZE};

/// Smallest size of a queue: a request to a disk has three descriptors.
const MIN_QUEUE_SIZE: u16 = 4;

/// Largest number of queues: the vhost-user protocol numbers no more vrings than this.
const MAX_QUEUES: u16 = 256;

/// The treatment of a back-end while memory is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lazy {
    /// Its accesses are trapped if it offers post-copy; otherwise it is refused.
    #[default]
    Auto,
    /// Its accesses are trapped. It must offer post-copy, even if no page is missing.
    Postcopy,
    /// All memory is filled before the back-end sees it.
    Fill,
    /// The back-end is refused.
    Refuse,
}

/// A virtio device whose back-end is another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "DeviceFields", into = "DeviceFields")]
pub struct VhostUserConfig {
    /// The kind of device that the guest sees.
    pub kind: DeviceKind,
    /// The back-end's socket.
    pub socket: PathBuf,
    /// Number of virtqueues. A restored device keeps the number that it had.
    pub queues: u16,
    /// Largest size of a queue, in descriptors. A restored device keeps the size that it had.
    pub queue_size: u16,
    /// The treatment of the back-end while memory is missing.
    pub lazy: Lazy,
    /// The device's name in messages; by default, its kind and position.
    pub id: Option<String>,
    /// A network card's address; by default the back-end's, or else one derived from the position.
    pub mac: Option<[u8; 6]>,
    /// The guest's address on a vsock (CID); by default, the back-end's.
    pub cid: Option<u64>,
}

impl VhostUserConfig {
    /// Creates the configuration of a device of this kind whose back-end listens on `socket`, with
    /// defaults for all other parts.
    pub fn new(kind: DeviceKind, socket: impl Into<PathBuf>) -> Self {
        VhostUserConfig {
            kind,
            socket: socket.into(),
            queues: kind.fixed_queues().unwrap_or(1),
            queue_size: kind.queue_size(),
            lazy: Lazy::Auto,
            id: None,
            mac: None,
            cid: None,
        }
    }
}

/// Errors from properties that a device cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceConfigError {
    /// The socket has an empty path.
    #[error("the path is empty; name the socket that the back-end listens on")]
    EmptySocket,
    /// The device has no queue.
    #[error("a device needs at least one queue")]
    NoQueue,
    /// The device has another number of queues, always.
    #[error("a device {kind} has {queues} queues; leave it out")]
    FixedQueues {
        /// The kind of device.
        kind: DeviceKind,
        /// Its number of queues.
        queues: u16,
    },
    /// The device has too many queues.
    #[error("a device has at most {MAX_QUEUES} queues")]
    TooManyQueues,
    /// The queues have an impossible size.
    #[error("a queue's size must be a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}")]
    QueueSize,
    /// The device has an impossible name.
    #[error("a name has 1 to 32 letters, digits, or any of - _ .")]
    Name,
    /// The text is not a MAC address.
    #[error("a MAC address must look like 02:00:00:00:00:01")]
    Mac,
    /// The MAC address is that of no single card.
    #[error("the MAC address is not a unicast address")]
    NotUnicast,
    /// The guest's address on a vsock is reserved.
    #[error("a guest has an address (CID) from 3 to 4294967294")]
    Cid,
    /// Another kind of device has this property.
    #[error("a device {kind} has no {property}; leave it out")]
    OtherKind {
        /// The kind of device.
        kind: DeviceKind,
        /// The property.
        property: &'static str,
    },
}

/// Returns the number of queues, if a device of this kind can have as many.
pub(crate) fn check_queues(kind: DeviceKind, queues: u16) -> Result<u16, DeviceConfigError> {
    match (queues, kind.fixed_queues()) {
        (0, _) => Err(DeviceConfigError::NoQueue),
        (queues, Some(fixed)) if queues != fixed => {
            Err(DeviceConfigError::FixedQueues { kind, queues: fixed })
        }
        (queues, _) if queues > MAX_QUEUES => Err(DeviceConfigError::TooManyQueues),
        (queues, _) => Ok(queues),
    }
}

/// Returns the size of a queue, if a queue can have it.
pub(crate) fn check_queue_size(size: u16) -> Result<u16, DeviceConfigError> {
    if size.is_power_of_two() && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) {
        Ok(size)
    } else {
        Err(DeviceConfigError::QueueSize)
    }
}

/// Whether `text` can be a device's name. The limits keep messages to one short line.
pub(crate) fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.len() <= 32 && text.chars().all(good)
}

/// Returns the name, if a device can have it.
pub(crate) fn check_name(text: &str) -> Result<String, DeviceConfigError> {
    if is_name(text) { Ok(text.into()) } else { Err(DeviceConfigError::Name) }
}

/// Parses the address of a network card.
pub(crate) fn parse_mac(text: &str) -> Result<[u8; 6], DeviceConfigError> {
    let byte = |part: &str| {
        let hex = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
        hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let bytes = bytes.ok_or(DeviceConfigError::Mac)?;
    let mac = <[u8; 6]>::try_from(bytes).map_err(|_| DeviceConfigError::Mac)?;
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(DeviceConfigError::NotUnicast);
    }
    Ok(mac)
}

/// Returns the guest's address on a vsock, if a guest can have it.
pub(crate) fn check_cid(cid: u64) -> Result<u64, DeviceConfigError> {
    // 0 to 2 denote the hypervisor, the local loop and the host (virtio 1.2, section 5.10.4).
    if (3..u64::from(u32::MAX)).contains(&cid) { Ok(cid) } else { Err(DeviceConfigError::Cid) }
}

/// A device in JSON. What is left out has its default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceFields {
    #[serde(rename = "type")]
    kind: DeviceKind,
    socket: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queues: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queue_size: Option<u16>,
    #[serde(default)]
    lazy: Lazy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cid: Option<u64>,
}

impl TryFrom<DeviceFields> for VhostUserConfig {
    type Error = DeviceConfigError;

    fn try_from(fields: DeviceFields) -> Result<Self, DeviceConfigError> {
        let kind = fields.kind;
        let only = |owner, property, is_given| match is_given && kind != owner {
            true => Err(DeviceConfigError::OtherKind { kind, property }),
            false => Ok(()),
        };
        only(DeviceKind::Net, "mac", fields.mac.is_some())?;
        only(DeviceKind::Vsock, "cid", fields.cid.is_some())?;
        if fields.socket.as_os_str().is_empty() {
            return Err(DeviceConfigError::EmptySocket);
        }
        let defaults = VhostUserConfig::new(kind, fields.socket);
        Ok(VhostUserConfig {
            queues: check_queues(kind, fields.queues.unwrap_or(defaults.queues))?,
            queue_size: check_queue_size(fields.queue_size.unwrap_or(defaults.queue_size))?,
            lazy: fields.lazy,
            id: fields.id.as_deref().map(check_name).transpose()?,
            mac: fields.mac.as_deref().map(parse_mac).transpose()?,
            cid: fields.cid.map(check_cid).transpose()?,
            ..defaults
        })
    }
}

impl From<VhostUserConfig> for DeviceFields {
    fn from(config: VhostUserConfig) -> Self {
        let mac = config.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
        DeviceFields {
            kind: config.kind,
            socket: config.socket,
            queues: Some(config.queues),
            queue_size: Some(config.queue_size),
            lazy: config.lazy,
            id: config.id,
            mac,
            cid: config.cid,
        }
    }
}
