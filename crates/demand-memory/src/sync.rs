// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The synchronization primitives of claiming, publishing and waiting: the standard library's, or
//! loom's while the model checker explores every interleaving of them.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};
