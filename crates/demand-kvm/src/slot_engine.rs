// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine of one memslot: all code that depends on the kind of engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use demand_memory::{GuestMapping, Mapped, PAGE_SIZE, PageRange, Pager};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::abi::{KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use crate::attributes::{Attributes, Reserved};
use crate::memslot::Bitmap;
use crate::{Engine, SlotError};

/// The engine of one memslot: the mechanism that stops vCPUs at its missing pages.
#[derive(Clone)]
pub(crate) enum SlotEngine {
    /// KVM reads the missing bitmap.
    Userfault,
    /// The pages are private to KVM.
    Attributes(Arc<Attributes>),
    /// The slot's mapping is armed, and KVM is not involved.
    Mapping,
    /// The slot's mapping has markers, at which KVM sends a signal to the vCPU's thread.
    Markers(Arc<MarkedMapping>),
}

/// A slot's mapping that has markers.
pub(crate) struct MarkedMapping {
    /// Address of its first byte.
    base: u64,
    /// Whether all pages have come, and no marker is left.
    finished: AtomicBool,
}

/// The event by which a vCPU's thread learns of missing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// `KVM_EXIT_MEMORY_FAULT` with these flags.
    Exit {
        /// The `KVM_MEMORY_EXIT_FLAG_` flags.
        flags: u64,
    },
    /// The signal at a marker.
    Marker,
}

/// The outcome of letting a vCPU through to present pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Through {
    /// The vCPU gets through now.
    Open,
    /// Nothing was in its way: another thread has let it through since, or the host's memory has
    /// failed.
    NothingChanged,
}

impl SlotEngine {
    /// Returns the `KVM_MEM_` flags of the slot until it is finished.
    pub(crate) fn slot_flags(&self) -> u32 {
        match self {
            SlotEngine::Userfault => KVM_MEM_USERFAULT,
            SlotEngine::Attributes(_) | SlotEngine::Mapping | SlotEngine::Markers(_) => 0,
        }
    }

    /// Returns the bitmap that KVM reads, if it reads one.
    pub(crate) fn bitmap(&self, pager: &Arc<Pager>) -> Option<Bitmap> {
        match self {
            SlotEngine::Userfault => Some(Bitmap::of_pager(pager)),
            SlotEngine::Attributes(_) | SlotEngine::Mapping | SlotEngine::Markers(_) => None,
        }
    }

    /// Returns whether vCPUs leave `KVM_RUN` at missing pages.
    pub(crate) fn stops_vcpus(&self) -> bool {
        matches!(self, SlotEngine::Markers(_)) || self.exit_flags().is_some()
    }

    /// Returns the address of the mapping's first byte, if it has, or had, markers.
    pub(crate) fn marked_base(&self) -> Option<u64> {
        if let SlotEngine::Markers(marked) = self { Some(marked.base) } else { None }
    }

    /// Returns whether a vCPU may still meet a marker.
    pub(crate) fn has_markers(&self) -> bool {
        matches!(self, SlotEngine::Markers(marked) if !marked.finished.load(Ordering::Acquire))
    }

    /// Returns the pages that a vCPU stopped at `pages` needs: at a marker, the whole unit.
    pub(crate) fn needed(&self, pager: &Pager, pages: PageRange) -> PageRange {
        match self {
            SlotEngine::Markers(_) => pages.grow_to_units(pager.unit_pages(), pager.pages()),
            _ => pages,
        }
    }

    /// Returns the flags of the exit `KVM_EXIT_MEMORY_FAULT` at a missing page; `None` if there is
    /// no such exit.
    pub(crate) fn exit_flags(&self) -> Option<u64> {
        match self {
            SlotEngine::Userfault => Some(KVM_MEMORY_EXIT_FLAG_USERFAULT),
            SlotEngine::Attributes(_) => Some(KVM_MEMORY_EXIT_FLAG_PRIVATE),
            SlotEngine::Mapping | SlotEngine::Markers(_) => None,
        }
    }

    /// Returns whether the engine stopped a vCPU at `pages`.
    ///
    /// An access to a private page is shared to KVM, and the exit has no flags, where KVM knows the
    /// address as one without memory: from before the slot was created.
    pub(crate) fn stops_at(&self, stop: Stop, pages: PageRange) -> bool {
        match (self, stop) {
            (SlotEngine::Attributes(attributes), Stop::Exit { flags: 0 }) => {
                attributes.is_private(pages)
            }
            (_, Stop::Exit { flags }) => self.exit_flags() == Some(flags),
            (_, Stop::Marker) => matches!(self, SlotEngine::Markers(_)),
        }
    }

    /// Gives a vCPU that has left `KVM_RUN` at `pages` access to them, now that they are present.
    /// `arrived`: the mapping has markers, and a page of these was missing until now.
    pub(crate) fn let_through(
        &self,
        pager: &Pager,
        pages: PageRange,
        arrived: bool,
    ) -> Result<Through, kvm_ioctls::Error> {
        match self {
            // The pager has cleared the bits, and KVM reads them again.
            SlotEngine::Userfault | SlotEngine::Mapping => Ok(Through::Open),
            SlotEngine::Attributes(attributes) => {
                attributes.clear(pager.bitmap(), pages).map(|()| Through::Open)
            }
            // The pager has mapped the page, in place of its marker, before it cleared the bit.
            SlotEngine::Markers(_) if arrived && pager.unit_pages() == 1 => Ok(Through::Open),
            SlotEngine::Markers(_) => Ok(map_unit(pager, pages)),
        }
    }

    /// Removes the part of the engine that outlives the slot's flags. No page may be missing,
    /// unless the slot is deleted.
    pub(crate) fn remove(&self) -> Result<(), SlotError> {
        match self {
            SlotEngine::Userfault | SlotEngine::Mapping => Ok(()),
            SlotEngine::Attributes(attributes) => attributes.clear_all(),
            SlotEngine::Markers(marked) => {
                marked.finished.store(true, Ordering::Release);
                Ok(())
            }
        }
    }
}

/// Maps a unit in place of its marker.
fn map_unit(pager: &Pager, unit: PageRange) -> Through {
    match pager.map_unit(unit) {
        Ok(Mapped::Now) => Through::Open,
        Ok(Mapped::Before | Mapped::Lost) => Through::NothingChanged,
        Err(error) => {
            // For lack of memory, or because the mapping is about to go: the vCPU comes again.
            log::debug!("cannot map pages for a vCPU: {error}");
            crate::changes::pause();
            Through::Open
        }
    }
}

/// Removes a slot's engine when it is dropped, which must be after the slot.
pub(crate) struct EngineGuard {
    pub(crate) engine: SlotEngine,
    /// Released last.
    _reserved: Option<Reserved>,
}

impl EngineGuard {
    /// Installs the engine for memslot `number`, before the slot is created, so that the guest
    /// never runs without it.
    pub(crate) fn install(
        engine: Engine,
        vm: &Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        mapping: &GuestMapping,
    ) -> Result<Self, SlotError> {
        let pager = mapping.pager();
        let (engine, _reserved) = match engine {
            Engine::KvmUserfault => (SlotEngine::Userfault, None),
            Engine::KvmAttributes => {
                let pages = pager.pages();
                let reserved = Reserved::take(vm, start, pages).ok_or(SlotError::Create {
                    number,
                    start: start.0,
                    size: pages * PAGE_SIZE,
                    flags: 0,
                    source: kvm_ioctls::Error::new(libc::EEXIST),
                })?;
                let attributes = Attributes::set(vm, number, start, pages)?;
                (SlotEngine::Attributes(attributes), Some(reserved))
            }
            Engine::Uffd => (SlotEngine::Mapping, None),
            Engine::UffdPoison => {
                let base = mapping.mapping().address().as_ptr() as u64;
                let marked = MarkedMapping { base, finished: AtomicBool::new(false) };
                (SlotEngine::Markers(Arc::new(marked)), None)
            }
        };
        Ok(EngineGuard { engine, _reserved })
    }
}

impl Drop for EngineGuard {
    fn drop(&mut self) {
        if let Err(error) = self.engine.remove() {
            log::error!("{error}; pages at this address stay private for the next memslot");
        }
    }
}
