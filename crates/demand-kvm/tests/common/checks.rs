// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks that hold under every engine whose vCPUs leave `KVM_RUN` at missing pages.

use super::*;
use demand_memory::{FaultPath, Fill, FillRate, Waiter};

/// Checks that filling memory overwrites no page that a guest has written. `written` is called in
/// between. The pager has [`page`]s of `pages` pages, at most twice 512.
pub fn check_writes_stay(
    machine: &Machine,
    slot: &DemandSlot,
    handler: &FaultHandler,
    written: impl FnOnce(),
) {
    let (pager, pages) = (slot.pager(), slot.pager().pages());
    let mut cpu = machine.vcpu(0);
    // Some are holes, and some have neighbours that stay missing.
    let value = 0xabcd_0000;
    let touched = Pages { first: 3, count: 200, stride: 5 };
    machine.load(&mut cpu, Program::Write { value }, touched);
    cpu.run(handler).unwrap();
    written();
    fill(pager);
    fill(pager);
    let expected = |index: u64| {
        let mut bytes = page(index);
        if index % 5 == 3 && index < 3 + 5 * 200 {
            let value = value + ((index - 3) / 5) as u32;
            bytes[16..20].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    };
    for half in [0, 512] {
        machine.copy_and_compare(&mut cpu, handler, Pages::run(half, 512), 0, expected);
    }
    for index in 0..pages {
        let bytes = look(slot.mapping(), index * PAGE_SIZE, PAGE_SIZE);
        assert!(bytes == expected(index), "page {index}");
    }
    assert_eq!(pager.stats().pages_arrived(), pages);
}

/// Copies pages by two vCPUs at the same time, and compares them.
pub fn copy_by_two(
    machine: &Machine,
    cpus: &mut [Cpu; 2],
    handler: &FaultHandler,
    pages: [Pages; 2],
) {
    thread::scope(|scope| {
        for (index, (cpu, pages)) in cpus.iter_mut().zip(pages).enumerate() {
            scope.spawn(move || {
                let out = index as u64 * 256;
                machine.copy_and_compare(cpu, handler, pages, out, page);
            });
        }
    });
}

/// Four vCPUs and a fill need the same pages from a source that writes each in pieces ([`Torn`]): a
/// page that becomes accessible before its last byte is written fails the check.
pub fn check_content_is_first(machine: &Machine, slot: &DemandSlot, handler: &FaultHandler) {
    let (pager, pages) = (slot.pager(), slot.pager().pages());
    thread::scope(|scope| {
        for id in 0..4 {
            scope.spawn(move || {
                let mut cpu = machine.vcpu(id);
                for touched in [
                    Pages { first: (id + 1) * pages / 4 - 1, count: pages / 4, stride: -1 },
                    Pages { first: id, count: pages / 4, stride: 4 },
                    Pages { first: pages - 1, count: pages, stride: -1 },
                ] {
                    machine.load(&mut cpu, Program::Check, touched);
                    cpu.run(handler).unwrap();
                }
            });
        }
        let rate = FillRate::BytesPerSecond(8 << 20);
        let fill = Fill::start(vec![pager.clone()], rate).unwrap();
        pager.ensure(PageRange::new(0, pages), FaultPath::Fill, &Waiter::new()).unwrap();
        drop(fill);
    });
    assert_eq!(pager.stats().pages_arrived(), pages);
    assert_eq!(slot.finish(), Ok(()));
}
