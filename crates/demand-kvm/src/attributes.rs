// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory attributes as a trap: KVM keeps guests out of pages that are "private" and have no
//! guest_memfd.
//!
//! Source: `Documentation/virt/kvm/api.rst`, sections `KVM_SET_MEMORY_ATTRIBUTES` and
//! `KVM_EXIT_MEMORY_FAULT`. The latter specifies the effect of an access to a private page of a
//! slot without guest_memfd: the vCPU leaves `KVM_RUN`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_memory::{BitmapReader, PAGE_SIZE, PageRange, to_usize};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::SlotError;

/// The attribute "private", set on all pages of a slot and cleared as the guest reaches them.
///
/// A page loses the attribute when a vCPU has left `KVM_RUN` for it, not when it becomes present:
/// this spares other populating threads (fill, a back-end's faults) an ioctl that stops the vCPUs.
/// Present neighbours lose it in the same call. That costs nothing where there are none, and where
/// fill is ahead of the guest it saves two thirds of the instructions (figures in the README).
pub(crate) struct Attributes {
    vm: Arc<VmFd>,
    number: u32,
    start: u64,
    pages: u64,
    /// Bit i is set while page i is private and no thread is clearing its attribute. KVM would zap
    /// the mappings of pages whose attribute is cleared a second time.
    private: Box<[AtomicU64]>,
}

impl Attributes {
    /// Makes all pages of memslot `number` private, before the slot is created.
    pub(crate) fn set(
        vm: &Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        pages: u64,
    ) -> Result<Arc<Self>, SlotError> {
        let words = (0..pages.div_ceil(64)).map(|word| {
            let here = (pages - word * 64).min(64);
            AtomicU64::new(u64::MAX >> (64 - here))
        });
        let attributes =
            Attributes { vm: vm.clone(), number, start: start.0, pages, private: words.collect() };
        attributes.change(PageRange::new(0, pages), PRIVATE).map_err(|source| {
            SlotError::Attributes { number, start: start.0, size: pages * PAGE_SIZE, source }
        })?;
        Ok(Arc::new(attributes))
    }

    /// Gives vCPUs access to `pages`, which are present and for which a vCPU has left `KVM_RUN`,
    /// and to their neighbours that are present too.
    ///
    /// A failure leaves the pages private: the vCPU leaves `KVM_RUN` for them again.
    pub(crate) fn clear(
        &self,
        missing: &BitmapReader,
        pages: PageRange,
    ) -> Result<(), kvm_ioctls::Error> {
        let Some((word, mask)) = self.present_around(missing, pages) else {
            return self.change(pages, 0);
        };
        let taken = self.private[word].fetch_and(!mask, Ordering::Relaxed) & mask;
        let first = word as u64 * 64 + u64::from(mask.trailing_zeros());
        let run = PageRange::new(first, u64::from(mask.count_ones()));
        let result = self.change(run, 0);
        if result.is_err() {
            self.private[word].fetch_or(taken, Ordering::Relaxed);
        }
        result
    }

    /// Returns whether any of the pages is private, and no thread is clearing its attribute.
    pub(crate) fn is_private(&self, pages: PageRange) -> bool {
        let bit = |page: u64| {
            self.private[to_usize(page / 64)].load(Ordering::Relaxed) >> (page % 64) & 1
        };
        (pages.first..pages.end()).any(|page| bit(page) != 0)
    }

    /// Returns the run of pages around a page that are both present and private, within one word of
    /// the bitmaps: 64 pages, 256 KiB. `None` if `pages` is not a single page, or if another vCPU
    /// is clearing it. In the latter case the caller clears the page all the same, because the
    /// other vCPU may not be done yet.
    fn present_around(&self, missing: &BitmapReader, pages: PageRange) -> Option<(usize, u64)> {
        if pages.count != 1 {
            return None;
        }
        let (word, bit) = (to_usize(pages.first / 64), (pages.first % 64) as u32);
        // Acquire: pages that become accessible have their content.
        let missing = missing.words().load(word);
        let run = run_around(self.private[word].load(Ordering::Relaxed) & !missing, bit);
        (run != 0).then_some((word, run))
    }

    /// Clears the attribute of all pages, in one call.
    pub(crate) fn clear_all(&self) -> Result<(), SlotError> {
        // KVM walks all pages, even if none has to change.
        if self.private.iter().all(|word| word.load(Ordering::Relaxed) == 0) {
            return Ok(());
        }
        self.change(PageRange::new(0, self.pages), 0).map_err(|source| SlotError::Attributes {
            number: self.number,
            start: self.start,
            size: self.pages * PAGE_SIZE,
            source,
        })?;
        self.private.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(())
    }

    fn change(&self, pages: PageRange, attributes: u64) -> Result<(), kvm_ioctls::Error> {
        change(&self.vm, self.start + pages.offset(), pages.bytes(), attributes)
    }
}

/// A range of guest addresses of one VM.
#[derive(Clone, Copy, PartialEq)]
struct Addresses {
    /// Address of the `VmFd`, as the VM's identity.
    vm: usize,
    start: u64,
    end: u64,
}

impl Addresses {
    fn overlap(&self, other: &Addresses) -> bool {
        self.vm == other.vm && self.start < other.end && other.start < self.end
    }
}

/// The reserved ranges of all VMs.
static RESERVED: Mutex<Vec<Addresses>> = Mutex::new(Vec::new());

fn reserved() -> MutexGuard<'static, Vec<Addresses>> {
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Exclusive use of the attributes of some guest addresses by one slot, until this is dropped.
///
/// KVM refuses overlapping slots, but attributes change before KVM sees the slot. Without the
/// reservation, undoing them for a refused slot would open another slot's missing pages to the
/// guest.
pub(crate) struct Reserved {
    addresses: Addresses,
    /// Keeps the `VmFd`, whose address identifies the VM.
    _vm: Arc<VmFd>,
}

impl Reserved {
    /// Reserves guest addresses of a VM; `None` if any of them is reserved already.
    pub(crate) fn take(vm: &Arc<VmFd>, start: GuestAddress, pages: u64) -> Option<Self> {
        let end = start.0.saturating_add(pages.saturating_mul(PAGE_SIZE));
        let new = Addresses { vm: Arc::as_ptr(vm) as usize, start: start.0, end };
        let mut all = reserved();
        if all.iter().any(|other| other.overlap(&new)) {
            return None;
        }
        all.push(new);
        Some(Reserved { addresses: new, _vm: vm.clone() })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        reserved().retain(|other| *other != self.addresses);
    }
}

/// The attribute of private pages.
pub(crate) const PRIVATE: u64 = kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

/// Sets the attributes of pages.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) fn change(
    vm: &VmFd,
    address: u64,
    size: u64,
    attributes: u64,
) -> Result<(), kvm_ioctls::Error> {
    vm.set_memory_attributes(kvm_bindings::kvm_memory_attributes {
        address,
        size,
        attributes,
        flags: 0,
    })
}

/// Fails: other architectures have no memory attributes.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn change(_: &VmFd, _: u64, _: u64, _: u64) -> Result<(), kvm_ioctls::Error> {
    Err(kvm_ioctls::Error::new(libc::ENOTTY))
}

/// Returns the run of ones in `word` that contains `bit`; 0 if that bit is 0.
fn run_around(word: u64, bit: u32) -> u64 {
    let up = (word >> bit).trailing_ones();
    if up == 0 {
        return 0;
    }
    let down = (word << (63 - bit)).leading_ones();
    let ones = up + down - 1;
    (u64::MAX >> (64 - ones)) << (bit + 1 - down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_its_ones_do() {
        let by_bits = |word: u64, bit: u32| {
            let mut run = 0;
            for bit in (0..=bit).rev().take_while(|bit| word >> bit & 1 == 1) {
                run |= 1 << bit;
            }
            for bit in (bit..64).take_while(|bit| word >> bit & 1 == 1) {
                run |= 1 << bit;
            }
            if word >> bit & 1 == 1 { run } else { 0 }
        };
        for word in [0, 1, u64::MAX, 1 << 63, 0xff00_f0f0_0000_01ff, u64::MAX >> 1, !1] {
            for bit in 0..64 {
                assert_eq!(run_around(word, bit), by_bits(word, bit), "{word:#x}, {bit}");
            }
        }
    }
}
