// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices of a Linux guest's machine that the VMM emulates itself.

pub mod chipset;
pub mod exits;
pub mod health;
pub mod pci;
pub mod pm_timer;
pub mod power;
pub mod registers;
pub mod serial;
pub(crate) mod terminal;
pub mod vmgenid;
