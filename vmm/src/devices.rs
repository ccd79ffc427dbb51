// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices of a Linux guest's machine that the VMM emulates itself.

pub(crate) mod chipset;
pub(crate) mod error;
pub(crate) mod exits;
pub(crate) mod health;
pub(crate) mod pci;
pub(crate) mod pm_timer;
pub(crate) mod power;
pub(crate) mod registers;
pub(crate) mod serial;
pub(crate) mod terminal;
pub(crate) mod vmgenid;
