// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fault on a page that no other thread has claimed allocates nothing.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use demand_kvm::{FaultHandler, FaultRegion, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, Waiter};
use vm_memory::GuestAddress;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is forwarded to the system's allocator. Counting touches only a thread-local
// cell that needs neither memory nor a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's guarantees are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_fault_allocates_nothing() {
    const PAGES: u64 = 4096;
    let pager = file_pager(BackingKind::Shmem, PAGES);
    let handler =
        FaultHandler::new([FaultRegion::userfault(GuestAddress(REGION), pager.clone())]).unwrap();
    let waiter = Waiter::new();
    let fault = |page: u64| {
        let before = ALLOCATIONS.get();
        let gpa = REGION + page * PAGE_SIZE;
        handler.handle(gpa, PAGE_SIZE, KVM_MEMORY_EXIT_FLAG_USERFAULT, &waiter).unwrap();
        ALLOCATIONS.get() - before
    };
    // The thread's statistics are allocated at its first fault, and the histogram of latencies
    // grows when a fault takes an order of magnitude longer than all before.
    fault(0);
    let allocated: u64 = (1..PAGES).map(fault).sum();
    assert!(allocated <= 20, "{allocated} allocations in {} faults", PAGES - 1);
    assert_eq!(pager.stats().path(FaultPath::Guest).faults, PAGES);
}
