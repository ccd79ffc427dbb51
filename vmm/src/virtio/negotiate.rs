// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Feature and config-space negotiation between the back-end and the guest.

use demand_vhost::{BackEnd, Error as BackEndError, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::config::device_kind::{BLK_NUM_QUEUES, BLK_SEG_MAX, DeviceKind, NET_F_MAC};
use crate::config::{Lazy, VhostUserOption};

/// Returns the features that the guest is offered.
pub(crate) fn offered(back_end: &BackEnd, option: &VhostUserOption) -> u64 {
    let config = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
    let features = option.kind.features(back_end.features(), config);
    if option.kind == DeviceKind::Blk && option.queues == 1 {
        return features & !(1 << VIRTIO_BLK_F_MQ);
    }
    features
}

pub(crate) fn check_back_end(back_end: &BackEnd, option: &VhostUserOption) -> Result<(), String> {
    let socket = option.socket.display();
    if back_end.features() & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err(format!(
            "the back-end at {socket} does not offer VERSION_1 (feature bit 32); use one that does"
        ));
    }
    let served = option.kind.served_queues(usize::from(option.queues)) as u64;
    let told = back_end.protocol_features().contains(VhostUserProtocolFeatures::MQ);
    let known = told || option.kind == DeviceKind::Blk;
    if known && back_end.queues() < served {
        return Err(format!(
            "it needs {served} queues, and the back-end at {socket} has {}; start the back-end \
             with more queues, or lower queues=",
            back_end.queues()
        ));
    }
    if served > 1
        && option.kind == DeviceKind::Blk
        && back_end.features() & 1 << VIRTIO_BLK_F_MQ == 0
    {
        return Err(format!(
            "it needs {served} queues, and the back-end at {socket} offers only one (no feature \
             MQ); start the back-end with more queues, or use queues=1"
        ));
    }
    if option.lazy == Lazy::Postcopy && !back_end.has_pagefault() {
        let error = BackEndError::NoPagefault { socket: option.socket.clone() };
        return Err(format!("lazy=postcopy: {error}"));
    }
    Ok(())
}

/// Whether the back-end determines a network card's address: it offers the feature, and its config
/// space can be read.
pub(crate) fn has_address(back_end: &BackEnd) -> bool {
    back_end.features() & 1 << NET_F_MAC != 0
        && back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG)
}

/// Returns the config space: the back-end's, with the fields that the VMM determines.
pub(crate) fn read_config(
    back_end: &mut BackEnd,
    option: &VhostUserOption,
    position: usize,
) -> Result<Vec<u8>, String> {
    let mut config = vec![0; option.kind.config_len()];
    let from_back_end = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
    if from_back_end && !config.is_empty() {
        back_end.read_config(0, &mut config).map_err(|error| error.to_string())?;
    }
    match option.kind {
        DeviceKind::Blk => {
            let queues = option.queues.to_le_bytes();
            config[BLK_NUM_QUEUES..BLK_NUM_QUEUES + 2].copy_from_slice(&queues);
            // A chain holds a header, its segments and a status, and cannot be longer than
            // the queue.
            let seg_max = &mut config[BLK_SEG_MAX..BLK_SEG_MAX + 4];
            let theirs = seg_max.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            let ours = u32::from(option.queue_size.saturating_sub(2));
            seg_max.copy_from_slice(&theirs.min(ours).to_le_bytes());
        }
        DeviceKind::Net => {
            let position = (position as u16).to_be_bytes();
            // A locally administered address. It depends on the position only, so it is the same at
            // each start.
            let made_up = [0x02, b'd', b'p', b'g', position[0], position[1]];
            match option.mac {
                Some(mac) => config[..6].copy_from_slice(&mac),
                None if !has_address(back_end) => config[..6].copy_from_slice(&made_up),
                None => {}
            }
        }
        DeviceKind::Vsock => {
            let theirs: [u8; 8] = config[..].try_into().unwrap_or_default();
            let theirs = u64::from_le_bytes(theirs);
            let socket = option.socket.display();
            match (option.cid, from_back_end) {
                (Some(ours), true) if ours != theirs => {
                    return Err(format!(
                        "cid={ours}: the back-end at {socket} gives the guest the CID {theirs}; \
                         leave cid= out, or start the back-end with the same CID"
                    ));
                }
                (Some(ours), _) => config.copy_from_slice(&ours.to_le_bytes()),
                (None, true) => {}
                (None, false) => {
                    return Err(format!(
                        "cannot read the guest's CID from the back-end at {socket}; give the one \
                         that it was started with, as in cid=3"
                    ));
                }
            }
        }
        DeviceKind::Rng | DeviceKind::Console => {}
    }
    Ok(config)
}
