// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Feature and config-space negotiation between the back-end and the guest.

use demand_vhost::{BackEnd, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::config::device_kind::{BLK_NUM_QUEUES, BLK_SEG_MAX, DeviceKind, NET_F_MAC};
use crate::config::{Lazy, VhostUserConfig};
use crate::virtio::error::NegotiationError;

/// Returns the features that the guest is offered.
pub(crate) fn offered(back_end: &BackEnd, option: &VhostUserConfig) -> u64 {
    let config = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
    let features = option.kind.features(back_end.features(), config);
    if option.kind == DeviceKind::Blk && option.queues == 1 {
        return features & !(1 << VIRTIO_BLK_F_MQ);
    }
    features
}

pub(crate) fn check_back_end(
    back_end: &BackEnd,
    option: &VhostUserConfig,
) -> Result<(), NegotiationError> {
    let socket = || option.socket.clone();
    if back_end.features() & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err(NegotiationError::NoVersion1 { socket: socket() });
    }
    let needed = option.kind.served_queues(usize::from(option.queues)) as u64;
    let told = back_end.protocol_features().contains(VhostUserProtocolFeatures::MQ);
    let known = told || option.kind == DeviceKind::Blk;
    if known && back_end.queues() < needed {
        let has = back_end.queues();
        return Err(NegotiationError::FewQueues { needed, socket: socket(), has });
    }
    if needed > 1
        && option.kind == DeviceKind::Blk
        && back_end.features() & 1 << VIRTIO_BLK_F_MQ == 0
    {
        return Err(NegotiationError::OneQueue { needed, socket: socket() });
    }
    if option.lazy == Lazy::Postcopy {
        back_end.expect_pagefault().map_err(NegotiationError::NoPostcopy)?;
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
    option: &VhostUserConfig,
    position: usize,
) -> Result<Vec<u8>, NegotiationError> {
    let mut config = vec![0; option.kind.config_len()];
    let from_back_end = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
    if from_back_end && !config.is_empty() {
        back_end.read_config(0, &mut config).map_err(NegotiationError::Config)?;
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
            let [.., high, low] = position.to_be_bytes();
            // A locally administered address. It depends on the position only, so it is the same at
            // each start.
            let made_up = [0x02, b'd', b'p', b'g', high, low];
            match option.mac {
                Some(mac) => config[..6].copy_from_slice(&mac),
                None if !has_address(back_end) => config[..6].copy_from_slice(&made_up),
                None => {}
            }
        }
        DeviceKind::Vsock => {
            let theirs: [u8; 8] = config[..].try_into().unwrap_or_default();
            let theirs = u64::from_le_bytes(theirs);
            let socket = option.socket.clone();
            match (option.cid, from_back_end) {
                (Some(ours), true) if ours != theirs => {
                    return Err(NegotiationError::Cid { wanted: ours, socket, theirs });
                }
                (Some(ours), _) => config.copy_from_slice(&ours.to_le_bytes()),
                (None, true) => {}
                (None, false) => return Err(NegotiationError::NoCid { socket }),
            }
        }
        DeviceKind::Rng | DeviceKind::Console => {}
    }
    Ok(config)
}
