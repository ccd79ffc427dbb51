// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio devices over MMIO, served by vhost-user back-ends.

pub mod error;
pub mod ioeventfd;
pub mod mmio;
pub(crate) mod negotiate;
pub mod request;
pub(crate) mod rings;
pub mod state;
pub mod vhost_user;
pub(crate) mod vsock;
