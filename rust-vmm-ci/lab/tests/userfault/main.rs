// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the lab's kernel patches (KVM Userfault, and the exit for pages that cannot be
//! resolved) on the real KVM. Run them with `cargo lab test -p lab --test userfault`.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![allow(unreachable_pub, missing_debug_implementations, reason = "modules of a test binary")]

mod flags;
mod guest;
mod guest_memfd;
mod instructions;
mod machine;
mod memory_fault;
mod nested;
mod notify;
mod probe;
mod pv;
mod strings;
mod tables;

use std::sync::atomic::Ordering;

use guest::{Access, Backing, Guest, LOG, PAGES, Shared, UNIT_PAGES, USERFAULT, content};

const BACKINGS: [Backing; 3] = [Backing::Shmem, Backing::Hugetlb, Backing::GuestMemfd];

/// Runs a test on each backing.
fn on_each(flags: u32, test: impl Fn(&mut Guest, Backing)) {
    on(&BACKINGS, flags, test);
}

/// Runs a test on each backing whose dirty pages KVM can log.
fn on_each_that_logs(flags: u32, test: impl Fn(&mut Guest, Backing)) {
    let logs: Vec<_> = BACKINGS.into_iter().filter(|backing| backing.logs()).collect();
    on(&logs, flags, test);
}

fn on(backings: &[Backing], flags: u32, test: impl Fn(&mut Guest, Backing)) {
    for &backing in backings {
        if let Some(mut guest) = Guest::new(backing, flags) {
            test(&mut guest, backing);
        }
    }
}

/// Asserts that exactly the pages that pass `arrived` are accessible.
fn only(guest: &mut Guest, arrived: impl Fn(usize) -> bool) {
    // Present pages first, so that a mapping that is too large is detected.
    for page in (0..PAGES).filter(|page| arrived(*page)) {
        assert_eq!(guest.load(page), Access::Done(content(page)));
    }
    for page in (0..PAGES).filter(|page| !arrived(*page)) {
        assert_eq!(guest.load(page), Access::Missing(page));
        assert_eq!(guest.store(page, 0), Access::Missing(page));
    }
}

#[test]
fn a_missing_page_exits_until_it_arrives() {
    on_each(USERFAULT, |guest, _| {
        for page in [0, 1, 63, 64, UNIT_PAGES - 1, UNIT_PAGES, PAGES - 1] {
            assert_eq!(guest.load(page), Access::Missing(page));
            assert_eq!(guest.resume(), Access::Missing(page));
            guest.arrive(page);
            assert_eq!(guest.resume(), Access::Done(content(page)));
        }
    });
}

#[test]
fn a_write_waits_for_the_page() {
    on_each(USERFAULT, |guest, _| {
        assert_eq!(guest.store(7, 42), Access::Missing(7));
        guest.arrive(7);
        assert_eq!(guest.resume(), Access::Done(42));
        assert_eq!(guest.memory.page(7).load(Ordering::Relaxed) as u32, 42);
    });
}

#[test]
fn neighbours_of_an_arrived_page_stay_missing() {
    on_each(USERFAULT, |guest, _| {
        for page in (0..PAGES).step_by(3) {
            guest.arrive(page);
        }
        only(guest, |page| page % 3 == 0);
    });
}

#[test]
fn another_mapping_of_the_bitmap_will_do() {
    on_each(USERFAULT, |guest, _| {
        let elsewhere = guest.bitmap.again().expect("mapped again");
        assert_eq!(guest.load(5), Access::Missing(5));
        guest.memory.page(5).store(content(5).into(), Ordering::Relaxed);
        elsewhere.clear(5);
        assert_eq!(guest.resume(), Access::Done(content(5)));
    });
}

#[test]
fn dirty_logging_opens_nothing() {
    on_each_that_logs(USERFAULT, |guest, _| {
        let arrived = |page: usize| page.is_multiple_of(2);
        for page in (0..PAGES).filter(|page| arrived(*page)) {
            guest.arrive(page);
        }
        only(guest, arrived);
        for _ in 0..2 {
            guest.set_flags(USERFAULT | LOG).expect("logging on");
            only(guest, arrived);
            assert_eq!(guest.store(4, content(4)), Access::Done(content(4)));
            assert_eq!(guest.dirty(), [4]);
            guest.set_flags(USERFAULT).expect("logging off");
            only(guest, arrived);
            assert_eq!(guest.huge_mappings(), 0);
        }
    });
}

#[test]
fn logging_may_outlast_the_flag() {
    on_each_that_logs(USERFAULT | LOG, |guest, backing| {
        for page in 0..PAGES {
            guest.arrive(page);
        }
        only(guest, |_| true);
        // KVM logs a page when it maps it writable, even for a read.
        assert_eq!(guest.dirty().len(), PAGES);
        guest.set_flags(LOG).expect("flag off, logging on");
        assert_eq!(guest.store(9, content(9)), Access::Done(content(9)));
        assert_eq!(guest.dirty(), [9]);
        assert_eq!(guest.huge_mappings(), 0);
        guest.set_flags(0).expect("logging off");
        only(guest, |_| true);
        expect_huge(guest, backing);
    });
}

#[test]
fn all_comes_back_when_the_flag_goes_off() {
    on_each(USERFAULT, |guest, backing| {
        for page in 0..PAGES {
            guest.arrive(page);
        }
        only(guest, |_| true);
        assert_eq!(guest.huge_mappings(), 0);
        guest.set_flags(0).expect("flag off");
        // Bits have no effect any more.
        guest.bitmap.set(3);
        only(guest, |_| true);
        expect_huge(guest, backing);
    });
}

#[test]
fn both_flags_may_go_off_at_once() {
    on_each_that_logs(USERFAULT | LOG, |guest, backing| {
        for page in 0..PAGES {
            guest.arrive(page);
        }
        only(guest, |_| true);
        guest.set_flags(0).expect("both off");
        only(guest, |_| true);
        expect_huge(guest, backing);
    });
}

#[test]
fn turned_on_later_it_holds_for_mapped_pages() {
    on_each(0, |guest, backing| {
        for page in 0..PAGES {
            guest.arrive(page);
        }
        only(guest, |_| true);
        expect_huge(guest, backing);
        for page in (1..PAGES).step_by(2) {
            guest.bitmap.set(page);
        }
        guest.set_flags(USERFAULT).expect("flag on");
        only(guest, |page| page % 2 == 0);
        guest.set_flags(0).expect("flag off");
        let more = if backing.logs() { LOG } else { 0 };
        guest.set_flags(USERFAULT | more).expect("on again");
        only(guest, |page| page % 2 == 0);
    });
}

#[test]
fn the_same_flags_again_change_nothing() {
    on_each(USERFAULT, |guest, _| {
        guest.arrive(0);
        only(guest, |page| page == 0);
        let other = Shared::new(Backing::Shmem, guest::PAGE).expect("bitmap");
        let mut region = guest.region(USERFAULT);
        region.pad2[0] = other.address();
        guest.set_region(region).expect("same flags");
        drop(other);
        only(guest, |page| page == 0);
    });
}

#[test]
fn later_bit_leaves_a_mapped_page_alone() {
    on_each(USERFAULT, |guest, _| {
        guest.arrive(0);
        assert_eq!(guest.load(0), Access::Done(content(0)));
        guest.bitmap.set(0);
        assert_eq!(guest.load(0), Access::Done(content(0)));
    });
}

#[test]
fn an_unreadable_bitmap_is_a_plain_fault() {
    on_each(USERFAULT, |guest, _| {
        guest.bitmap.forbid();
        assert_eq!(guest.load(0), Access::Unexplained);
    });
}

#[test]
fn pages_are_not_mapped_ahead_over_set_bits() {
    on_each(USERFAULT, |guest, _| {
        guest.arrive(1);
        let error = match guest.pre_fault(0) {
            // Shadow paging does not support this ioctl.
            Err(error) if error.errno() == libc::EOPNOTSUPP => return,
            result => result.expect_err("page 0 is missing"),
        };
        assert_eq!(error.errno(), libc::EFAULT);
        guest.pre_fault(1).expect("page 1 has arrived");
        only(guest, |page| page == 1);
    });
}

#[test]
fn wrong_requests_are_refused() {
    on_each(0, |guest, backing| {
        let refused = |result: Result<(), vmm_sys_util::errno::Error>| {
            assert_eq!(result.expect_err("refused").errno(), libc::EINVAL);
        };
        refused(guest.set_flags_by_old_ioctl(USERFAULT));
        refused(guest.set_flags(USERFAULT | 1 << 4));
        for pointer in [guest.bitmap.address() + 1, u64::MAX - 7] {
            let mut region = guest.region(USERFAULT);
            region.pad2[0] = pointer;
            refused(guest.set_region(region));
        }
        guest.set_flags(USERFAULT).expect("flag on");
        refused(guest.set_flags_by_old_ioctl(USERFAULT | LOG));
        // The old ioctl may turn the flag off, unless it also drops the guest_memfd.
        let off = guest.set_flags_by_old_ioctl(0);
        if backing == Backing::GuestMemfd { refused(off) } else { off.expect("flag off") }
    });
}

/// Asserts that KVM uses huge mappings again, if the backing has huge pages.
fn expect_huge(guest: &Guest, backing: Backing) {
    if backing == Backing::Hugetlb {
        assert_eq!(guest.huge_mappings(), (PAGES / UNIT_PAGES) as u64);
    }
}
