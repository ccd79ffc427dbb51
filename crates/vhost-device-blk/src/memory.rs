// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The types of guest memory and rings that this device uses.

use vhost_user_backend::VringMutex;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory, with the log of written pages that a migrating front-end may request.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// The current guest memory, which front-ends may replace.
pub type AtomicMemory = GuestMemoryAtomic<Memory>;
/// A queue, locked by its thread and by the messages that concern it.
pub type Vring = VringMutex<AtomicMemory>;
