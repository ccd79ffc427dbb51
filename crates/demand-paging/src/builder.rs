// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The choices from which demand-paged memory is made.

use std::fmt;
use std::sync::Arc;

use demand_kvm::{EngineChoice, ProbeCache, guest_memfd};
use demand_memory::{
    Backing, BackingError, BackingKind, Failure, FillOptions, MemfdBacking, Retrier, RetryPolicy,
    Stats,
};
use demand_source::PageSource;
use demand_uffd::ServiceOptions;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::{Error, Lazy, LazyMemory};

/// The way in which the memory objects of regions are created.
pub(crate) enum MakeBacking {
    /// As memory of this kind.
    Kind(BackingKind),
    /// By the caller's function.
    By(OfSize),
}

/// Creates a memory object of this many bytes.
type OfSize = Box<dyn Fn(u64) -> Result<Arc<dyn Backing>, BackingError> + Send>;

impl MakeBacking {
    /// Returns whether the memory belongs to a VM, which must exist before it.
    pub(crate) fn is_of_vm(&self) -> bool {
        matches!(self, MakeBacking::Kind(BackingKind::GuestMemfd))
    }

    /// Creates the memory object of a region, for this VM if there is one already.
    pub(crate) fn make(
        &self,
        vm: Option<&VmFd>,
        size: u64,
    ) -> Result<Arc<dyn Backing>, BackingError> {
        match (self, vm) {
            (MakeBacking::By(make), _) => make(size),
            (MakeBacking::Kind(BackingKind::GuestMemfd), Some(vm)) => {
                Ok(Arc::new(guest_memfd(vm, size)?))
            }
            (MakeBacking::Kind(kind), _) => Ok(Arc::new(MemfdBacking::new(*kind, size)?)),
        }
    }
}

/// Receives the outcome of the removal of demand paging.
pub(crate) type OnFinish = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// A region of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) start: GuestAddress,
    pub(crate) size: u64,
    pub(crate) image_offset: u64,
}

/// The way in which demand paging is removed when the last page is present.
pub(crate) enum Finish {
    /// A thread of the VM removes demand paging, and reports that here.
    AtOnce(OnFinish),
    /// The caller calls [`LazyVm::finish`](crate::LazyVm::finish).
    ByCaller,
}

/// The choices from which [`LazyMemory`] is made. Each has a default that suits most VMMs.
///
/// # Examples
///
/// ```
/// use demand_paging::demand_source::LocalFile;
/// use demand_paging::{BackingKind, LazyBuilder};
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let image = tempfile::NamedTempFile::new()?;
/// # image.as_file().set_len(2 << 20)?;
/// # let path = image.path();
/// let source = Arc::new(LocalFile::open(path)?);
/// let built = LazyBuilder::new(source)
///     .region(GuestAddress(0), 1 << 20)
///     .region(GuestAddress(4 << 30), 1 << 20)
///     .backing(BackingKind::Shmem)
///     .on_failure(|failure| eprintln!("{failure}"))
///     .build();
/// let memory = match built {
///     Ok(memory) => memory,
///     Err(error) => return Ok(eprintln!("{error}")),
/// };
/// // Usable at once: exactly the page that is read is fetched.
/// assert_eq!(memory.memory().read_obj::<u64>(GuestAddress(4 << 30))?, 0);
/// # Ok(())
/// # }
/// ```
pub struct LazyBuilder {
    pub(crate) source: Option<Arc<dyn PageSource>>,
    pub(crate) regions: Vec<Placed>,
    pub(crate) backing: MakeBacking,
    pub(crate) engine: EngineChoice,
    pub(crate) probes: Option<ProbeCache>,
    pub(crate) lazy: Lazy,
    pub(crate) fill: Option<FillOptions>,
    pub(crate) service: ServiceOptions,
    pub(crate) stats: Arc<Stats>,
    pub(crate) retrier: Retrier,
    pub(crate) first_slot: u32,
    pub(crate) finish: Finish,
}

impl LazyBuilder {
    /// Begins with memory whose pages come from `source`.
    pub fn new(source: Arc<dyn PageSource>) -> Self {
        LazyBuilder::of(Some(source))
    }

    /// Begins with memory whose pages are all present, and zero: for a guest that boots. Engine,
    /// laziness and fill are irrelevant to it, and it needs at least one
    /// [`region`](Self::region).
    pub fn zeroed() -> Self {
        LazyBuilder::of(None)
    }

    fn of(source: Option<Arc<dyn PageSource>>) -> Self {
        LazyBuilder {
            source,
            regions: Vec::new(),
            backing: MakeBacking::Kind(BackingKind::Shmem),
            engine: EngineChoice::Auto,
            probes: None,
            lazy: Lazy::Auto,
            fill: None,
            service: ServiceOptions::default(),
            stats: Arc::new(Stats::new()),
            retrier: Retrier::logging(RetryPolicy::default()),
            first_slot: 0,
            finish: Finish::AtOnce(Box::new(|outcome| match outcome {
                Ok(()) => log::info!("guest memory is complete, and no demand paging remains"),
                Err(error) => log::error!("{error}"),
            })),
        }
    }

    /// Adds a region of `size` bytes at guest physical address `start`. Its pages follow those of
    /// the region before in the source. Without any region, memory is as large as the source, in
    /// whole pages, and begins at address 0. A region that ends after the last page of the source
    /// is refused, unless the source is padded with zeros ([`demand_source::ZeroPadded`]).
    #[must_use]
    pub fn region(self, start: GuestAddress, size: u64) -> Self {
        let before = self.regions.last();
        let image_offset =
            before.map_or(0, |before| before.image_offset.saturating_add(before.size));
        self.region_at(start, size, image_offset)
    }

    /// Adds a region like [`region`](Self::region), whose first byte is at `image_offset` in the
    /// source: a multiple of 4096.
    #[must_use]
    pub fn region_at(mut self, start: GuestAddress, size: u64, image_offset: u64) -> Self {
        self.regions.push(Placed { start, size, image_offset });
        self
    }

    /// Sets the kind of memory behind the regions. The default is shared memory.
    ///
    /// [`BackingKind::GuestMemfd`] belongs to a VM, which [`build`](Self::build) creates then:
    /// [`LazyMemory::create_vm`] returns it. It cannot have all that other kinds have:
    /// [`demand_kvm::GUEST_MEMFD_LIMITS`].
    #[must_use]
    pub fn backing(self, kind: BackingKind) -> Self {
        LazyBuilder { backing: MakeBacking::Kind(kind), ..self }
    }

    /// Sets the function that creates the memory object of a region of this many bytes: for a
    /// backing of one's own, or a [`MemfdBacking`] with options.
    #[must_use]
    pub fn backing_from(
        self,
        make: impl Fn(u64) -> Result<Arc<dyn Backing>, BackingError> + Send + 'static,
    ) -> Self {
        LazyBuilder { backing: MakeBacking::By(Box::new(make)), ..self }
    }

    /// Sets the engine that traps the vCPUs' accesses to missing pages. The default is the best one
    /// that the host has.
    #[must_use]
    pub fn engine(self, engine: EngineChoice) -> Self {
        LazyBuilder { engine, ..self }
    }

    /// Keeps what is found out about KVM's engines in this file, for the next start of the program.
    /// By default the engine is tried each time, and no file is written.
    #[must_use]
    pub fn probe_cache(self, cache: ProbeCache) -> Self {
        LazyBuilder { probes: Some(cache), ..self }
    }

    /// Sets whether memory may be, or must be, read before the guest runs.
    #[must_use]
    pub fn lazy(self, lazy: Lazy) -> Self {
        LazyBuilder { lazy, ..self }
    }

    /// Sets the threads that serve faults of userfaultfds, and whether they spin while faults come
    /// thick: in place of the default options.
    #[must_use]
    pub fn fault_service(self, options: impl Into<ServiceOptions>) -> Self {
        LazyBuilder { service: options.into(), ..self }
    }

    /// Fetches the pages that nothing asks for in the background, from
    /// [`attach`](LazyMemory::attach) on. To begin later, call
    /// [`LazyVm::start_fill`](crate::LazyVm::start_fill) instead: the guest's first pages then
    /// compete with nothing.
    #[must_use]
    pub fn fill(self, options: impl Into<FillOptions>) -> Self {
        LazyBuilder { fill: Some(options.into()), ..self }
    }

    /// Sets the function that is called with each failed fetch. The page stays missing, its
    /// accessors wait, and the fetch is retried. It is also called with a page that a thread waits
    /// for and that the source leaves unanswered: see [`Retrier::new`]. The function runs on
    /// threads that serve faults, so it must not block. By default failures are logged as warnings
    /// ([`Retrier::logging`]), which a program without a logger does not show: its guest then waits
    /// without a word.
    #[must_use]
    pub fn on_failure(self, observer: impl Fn(&Failure<'_>) + Send + Sync + 'static) -> Self {
        self.retrier(Retrier::new(RetryPolicy::default(), observer))
    }

    /// Sets the retrier of failed fetches, in place of one with the default policy.
    #[must_use]
    pub fn retrier(self, retrier: Retrier) -> Self {
        LazyBuilder { retrier, ..self }
    }

    /// Sets the statistics that are updated, in place of new ones.
    #[must_use]
    pub fn stats(self, stats: Arc<Stats>) -> Self {
        LazyBuilder { stats, ..self }
    }

    /// Sets the number of the first memslot. The regions take consecutive numbers from there on;
    /// the default is 0.
    #[must_use]
    pub fn first_slot(self, number: u32) -> Self {
        LazyBuilder { first_slot: number, ..self }
    }

    /// Sets the function that is called once demand paging has been removed because the last page
    /// is present, or could not be. It is called on a thread of the VM, or by
    /// [`attach`](LazyMemory::attach) if all memory was read before; never if the VM ends first. By
    /// default the outcome is logged.
    #[must_use]
    pub fn on_finish(self, callback: impl FnOnce(Result<(), Error>) + Send + 'static) -> Self {
        LazyBuilder { finish: Finish::AtOnce(Box::new(callback)), ..self }
    }

    /// Leaves the removal of demand paging to the caller, who calls
    /// [`LazyVm::finish`](crate::LazyVm::finish) once the last page is present.
    #[must_use]
    pub fn finish_by_caller(self) -> Self {
        LazyBuilder { finish: Finish::ByCaller, ..self }
    }

    /// Creates the memory. Its time does not depend on the size of the memory: nothing is read yet.
    ///
    /// # Errors
    ///
    /// [`Error`], with the step that this host refuses. Under [`Lazy::Require`] that includes all
    /// that demand paging needs.
    pub fn build(self) -> Result<LazyMemory, Error> {
        LazyMemory::new(self)
    }
}

impl fmt::Debug for LazyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyBuilder")
            .field("regions", &self.regions)
            .field("engine", &self.engine)
            .field("lazy", &self.lazy)
            .field("fill", &self.fill)
            .finish_non_exhaustive()
    }
}
