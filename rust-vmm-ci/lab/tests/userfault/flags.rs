// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that turn KVM_MEM_USERFAULT and dirty logging on and off in any order while the guest uses
//! its memory. (A WARN of the lab's kernel fails the run.)

use crate::guest::{Access, Backing, Guest, LOG, PAGES, USERFAULT, content};
use crate::{BACKINGS, only};

const STATES: [u32; 4] = [0, USERFAULT, LOG, USERFAULT | LOG];

/// Returns the flags that a slot of this backing can have.
fn states(backing: Backing) -> Vec<u32> {
    STATES.into_iter().filter(|flags| backing.logs() || flags & LOG == 0).collect()
}

/// Makes the guest access some of its pages, and checks that it misses the odd ones while the flag
/// is on.
fn touch(guest: &mut Guest, flags: u32, step: usize) {
    for page in (0..PAGES).step_by(step) {
        if page % 2 == 0 {
            assert_eq!(guest.load(page), Access::Done(content(page)));
            assert_eq!(guest.store(page, content(page)), Access::Done(content(page)));
        }
    }
    if flags & USERFAULT != 0 {
        for page in (0..PAGES).step_by(step).filter(|page| page % 2 == 1) {
            assert_eq!(guest.load(page), Access::Missing(page));
            assert_eq!(guest.store(page, 0), Access::Missing(page));
        }
        assert_eq!(guest.huge_mappings(), 0);
    }
    if flags & LOG != 0 {
        assert_eq!(guest.huge_mappings(), 0);
    }
}

/// Returns the number of huge mappings of a guest that never had either flag, after it has used all
/// its memory.
fn plain(backing: Backing) -> Option<u64> {
    let mut guest = Guest::new(backing, 0)?;
    for page in 0..PAGES {
        guest.arrive(page);
    }
    only(&mut guest, |_| true);
    Some(guest.huge_mappings())
}

#[test]
fn no_order_of_changes_opens_a_page() {
    for backing in BACKINGS {
        let Some(huge) = plain(backing) else { continue };
        if backing == Backing::Hugetlb {
            assert_ne!(huge, 0);
        }
        let states = states(backing);
        for &start in &states {
            let Some(mut guest) = Guest::new(backing, start) else { return };
            for page in (0..PAGES).step_by(2) {
                guest.arrive(page);
            }
            let mut flags = start;
            touch(&mut guest, flags, 7);
            let mut go = |to| {
                if to != flags {
                    guest.set_flags(to).expect("flags");
                    flags = to;
                }
                touch(&mut guest, flags, 37);
            };
            for &first in &states {
                for &second in &states {
                    for &third in &states {
                        // Starts from the same state each time.
                        [start, first, second, third].into_iter().for_each(&mut go);
                    }
                }
            }
            // Turns the flag on once more, whatever is mapped by then, and then off for good.
            guest.set_flags(USERFAULT).expect("flags");
            touch(&mut guest, USERFAULT, 1);
            for page in 0..PAGES {
                guest.arrive(page);
            }
            only(&mut guest, |_| true);
            guest.set_flags(0).expect("flags");
            only(&mut guest, |_| true);
            assert_eq!(guest.huge_mappings(), huge, "{backing:?}, from {start:#x}");
        }
    }
}

#[test]
fn huge_pages_come_back_as_in_plain_slots() {
    for backing in BACKINGS {
        let Some(huge) = plain(backing) else { continue };
        for flags in states(backing).into_iter().filter(|flags| flags & USERFAULT != 0) {
            let Some(mut guest) = Guest::new(backing, flags) else { return };
            for page in 0..PAGES {
                assert_eq!(guest.load(page), Access::Missing(page));
                guest.arrive(page);
                assert_eq!(guest.resume(), Access::Done(content(page)));
            }
            assert_eq!(guest.huge_mappings(), 0);
            if flags & LOG != 0 {
                guest.set_flags(LOG).expect("flag off");
                only(&mut guest, |_| true);
                assert_eq!(guest.huge_mappings(), 0);
            }
            guest.set_flags(0).expect("all off");
            only(&mut guest, |_| true);
            assert_eq!(guest.huge_mappings(), huge, "{backing:?}");
        }
    }
}
