// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handle of a VM's demand-paged memory: everything from its start to its end.

use std::error::Error as StdError;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use demand_kvm::{
    DemandSlot, DemandVcpu, Engine, FaultError, FaultHandler, MsrFilter, PageMessages, Probe,
};
use demand_memory::{
    FillOptions, OwnProcess, PageRange, Pager, Retrier, Stats, Waiter, join_within,
};
use demand_uffd::FaultService;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::builder::{Finish, MakeBacking};
use crate::completion::Completion;
use crate::current::{AddressSpace, Current, MemoryGuard};
use crate::filling::Filling;
use crate::hotplug::install_loader;
use crate::vcpus::Vcpus;
use crate::{Error, Lazy, LazyVcpu, kvm_waits};

/// Longest wait at the end for the vCPUs to leave the guest while pages still arrive, and again
/// once the guest's memory is revoked.
const END_WITHIN: Duration = Duration::from_secs(2);

/// A step that precedes the removal of demand paging.
type BeforeFinish = Box<dyn FnMut() -> Result<(), Box<dyn StdError + Send + Sync>> + Send>;

/// Whether demand paging has been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removed {
    Yes,
    NotYet,
}

/// The parts of a VM's memory.
pub(crate) struct Parts {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) current: Arc<Current>,
    pub(crate) engine: Option<Engine>,
    pub(crate) probe: Option<Probe>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) retrier: Option<Retrier>,
    pub(crate) service: Arc<FaultService>,
    pub(crate) slots: Vec<Arc<DemandSlot>>,
    pub(crate) backing: MakeBacking,
    pub(crate) lazy: Lazy,
    pub(crate) msr_filter: Option<MsrFilter>,
}

/// The parts of a VM's memory that its threads share.
pub(crate) struct Inner {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) current: Arc<Current>,
    engine: Option<Engine>,
    pub(crate) probe: Option<Probe>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) retrier: Option<Retrier>,
    pub(crate) service: Arc<FaultService>,
    pub(crate) handler: Arc<FaultHandler>,
    /// By guest address.
    pub(crate) slots: Mutex<Vec<Arc<DemandSlot>>>,
    /// Creates the memory objects of regions that come later.
    pub(crate) backing: Mutex<MakeBacking>,
    pub(crate) lazy: Lazy,
    /// The pager of a region that is being inserted.
    pub(crate) inserting: Mutex<Option<Arc<Pager>>>,
    #[cfg(feature = "vhost")]
    pub(crate) back_ends: Mutex<Vec<std::sync::Weak<Mutex<demand_vhost::BackEnd>>>>,
    expects_back_ends: AtomicBool,
    /// The trap for the guest's writes to MSRs that name memory for KVM, if KVM supports it.
    msr_filter: Option<MsrFilter>,
    pub(crate) vcpus: Vcpus,
    /// KVM's waits for pages in its own accesses, while they are possible.
    page_messages: Mutex<Option<PageMessages>>,
    fill: Mutex<Option<Filling>>,
    before_finish: Mutex<Vec<BeforeFinish>>,
    /// Whether demand paging is removed. Locked for as long as that takes, and while regions change.
    finished: Mutex<bool>,
    /// Whether the guest has ended. Locked for as long as that takes.
    ended: Mutex<bool>,
    process: OwnProcess,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.vcpus.end().check()
    }

    /// Returns whether huge pages are to be created with their content, for back-ends.
    pub(crate) fn expects_back_ends(&self) -> bool {
        self.expects_back_ends.load(Ordering::Relaxed)
    }

    /// Makes background fill, if it runs, fill the memory as it is now.
    pub(crate) fn fill_again(&self) -> Result<(), Error> {
        let mut filling = lock(&self.fill);
        let again = filling.as_ref().map(|before| before.again(&self.current.get())).transpose()?;
        let before = std::mem::replace(&mut *filling, again);
        drop(filling);
        drop(before);
        Ok(())
    }

    pub(crate) fn finish(&self) -> Result<(), Error> {
        let mut finished = lock(&self.finished);
        if *finished || self.engine.is_none() {
            return Ok(());
        }
        self.check()?;
        let missing = |pager: &Arc<Pager>| {
            let bitmap = pager.bitmap();
            if bitmap.is_complete() {
                return 0;
            }
            bitmap.count_missing(PageRange::new(0, pager.pages()))
        };
        match self.current.get().pagers().map(missing).sum() {
            0 => {}
            missing => return Err(Error::Missing { missing }),
        }
        let mut steps = std::mem::take(&mut *lock(&self.before_finish));
        if let Err(error) = steps.iter_mut().try_for_each(|step| step()) {
            // All of them are repeated by the next call.
            lock(&self.before_finish).append(&mut steps);
            return Err(Error::BeforeFinish(error));
        }
        // No page is missing that KVM could wait for.
        drop(lock(&self.page_messages).take());
        self.service.finish().map_err(Error::FinishService)?;
        let slots = lock(&self.slots).clone();
        slots.iter().try_for_each(|slot| slot.finish()).map_err(Error::FinishSlot)?;
        let removed = self.msr_filter.iter().try_for_each(MsrFilter::remove);
        removed.map_err(Error::FinishMsrFilter)?;
        *finished = true;
        Ok(())
    }

    /// Ends the guest, once. A concurrent call returns when it has ended.
    fn end(&self) {
        self.vcpus.end().reach();
        let mut ended = lock(&self.ended);
        if std::mem::replace(&mut *ended, true) {
            return;
        }
        // While pages can still become present: a vCPU may be blocked on one inside KVM, where a
        // kick does not reach it.
        let left = self.vcpus.call_out(END_WITHIN);
        drop(lock(&self.page_messages).take());
        if left > 0 {
            log::warn!(
                "vCPUs stopped in the middle of an instruction, because they wait for pages that \
                 do not arrive: {left}"
            );
        }
        self.current.get().revoke();
        lock(&self.inserting).iter().for_each(|pager| pager.stop());
        let left = self.vcpus.call_out(END_WITHIN);
        if left > 0 {
            log::error!("vCPUs that do not leave the guest: {left}; check the kernel log");
        }
        let fill = lock(&self.fill).take();
        drop(fill);
        // Deletes the memslots, then removes the traps of their mappings. After that the VM may be
        // closed.
        let slots = std::mem::take(&mut *lock(&self.slots));
        if left == 0 {
            drop(slots);
        } else {
            delete_within(slots, END_WITHIN);
        }
        self.service.stop();
        let steps = std::mem::take(&mut *lock(&self.before_finish));
        drop(ended);
        // Dropping what a step owns may end the guest.
        drop(steps);
    }
}

/// Deletes memslots while vCPUs are left in the guest. KVM then waits for those that are blocked in
/// the kernel.
fn delete_within(slots: Vec<Arc<DemandSlot>>, within: Duration) {
    let thread = thread::Builder::new().name("delete-slots".into()).spawn(move || drop(slots));
    // Without a thread they are deleted here.
    if join_within(thread.into_iter().collect(), within) > 0 {
        log::error!(
            "cannot delete the memslots: KVM waits for the vCPUs that do not leave the guest; their \
             memory remains until they do, or until the process ends"
        );
    }
}

/// A VM whose memory arrives as it is used: the one handle that runs all of it, and whose drop ends
/// all of it.
///
/// It owns what demand paging needs: memslots, the fault service, background fill, the trap for
/// MSRs that name memory to KVM, and the removal of all that when the last page is present. Regions
/// [come](Self::insert_region) and [go](Self::remove_region) through it, too.
///
/// Dropping it ends the guest, in this order: no [`LazyVcpu`] steps any more, those in the guest
/// are kicked out; the guest's memory is [revoked](demand_memory::DemandMemory::revoke), so that
/// nothing waits for a page, not even inside KVM; background fill ends; memslots are deleted, and
/// traps removed. It usually takes a millisecond, and at most some seconds: each wait for a source,
/// a back-end or the kernel that does not answer has a limit. (If a vCPU is blocked inside KVM on
/// memory that is not this VM's, its memslots are deleted later, and a line in the log says so. A
/// vCPU that is not a [`LazyVcpu`] must have left the guest before.) Clones of the memory, vCPUs,
/// kicks, the VM's file descriptor and back-ends may be dropped before or after it, in any order:
/// each keeps what it needs. From then on an access to a missing page is an error, and never zeros;
/// pages that are present can still be read and written through the clones of the memory.
///
/// A child process made by `fork` has no part in it: dropping it there changes nothing, and the
/// child's accesses to missing pages are errors. Fork to become a daemon before the memory is
/// built.
///
/// # Examples
///
/// A guest that halts at once, from an image:
///
/// ```
/// use demand_paging::demand_kvm::open_kvm;
/// use demand_paging::demand_source::LocalFile;
/// use demand_paging::{LazyBuilder, Step};
/// use kvm_ioctls::VcpuExit;
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let Ok(_) = open_kvm() else { return Ok(()) };
/// # let image = tempfile::NamedTempFile::new()?;
/// # image.as_file().set_len(1 << 20)?;
/// # std::os::unix::fs::FileExt::write_all_at(image.as_file(), &[0xf4], 0x7000)?; // hlt
/// # let path = image.path();
/// let kvm = open_kvm()?;
/// let lazy = match LazyBuilder::new(Arc::new(LocalFile::open(path)?)).build() {
///     Ok(lazy) => lazy,
///     Err(error) => return Ok(eprintln!("{error}")),
/// };
/// let vm = lazy.create_vm(&kvm)?;
/// let vm = lazy.attach(vm)?;
///
/// let mut vcpu = vm.create_vcpu(0)?;
/// let mut sregs = vcpu.fd().get_sregs()?;
/// (sregs.cs.base, sregs.cs.selector) = (0, 0);
/// vcpu.set_sregs(&sregs)?;
/// let mut regs = vcpu.fd().get_regs()?;
/// regs.rip = 0x7000;
/// vcpu.fd().set_regs(&regs)?;
/// loop {
///     match vcpu.step()? {
///         Step::Again => {} // A page arrived, or the vCPU was kicked.
///         Step::Exit(VcpuExit::Hlt) => break,
///         Step::Exit(exit) => panic!("{exit:?}"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it ends the guest"]
pub struct LazyVm {
    // Dropped after the guest has ended: a completion under way fails then, and its thread ends.
    inner: Arc<Inner>,
    completion: OnceLock<Completion>,
}

impl LazyVm {
    pub(crate) fn new(parts: Parts, finish: Finish) -> Result<Self, Error> {
        let Parts { vm, current, engine, probe, stats, retrier, .. } = parts;
        let handler = Arc::new(FaultHandler::new(parts.slots.iter().map(|slot| &**slot))?);
        let page_messages = match engine {
            Some(Engine::KvmUserfault) => kvm_waits::begin(&vm, &handler, &parts.service),
            _ => None,
        };
        let inner = Arc::new(Inner {
            vm,
            current,
            engine,
            probe,
            stats,
            retrier,
            service: parts.service,
            handler,
            slots: Mutex::new(parts.slots),
            backing: Mutex::new(parts.backing),
            lazy: parts.lazy,
            inserting: Mutex::default(),
            #[cfg(feature = "vhost")]
            back_ends: Mutex::default(),
            expects_back_ends: AtomicBool::new(false),
            msr_filter: parts.msr_filter,
            vcpus: Vcpus::default(),
            page_messages: Mutex::new(page_messages),
            fill: Mutex::default(),
            before_finish: Mutex::default(),
            finished: Mutex::default(),
            ended: Mutex::default(),
            process: OwnProcess::current(),
        });
        let this = LazyVm { inner, completion: OnceLock::new() };
        match (finish, engine) {
            (Finish::AtOnce(on_finish), Some(_)) => {
                let vm = Arc::downgrade(&this.inner);
                let _ = this.completion.set(Completion::start(&this.inner.current, vm, on_finish)?);
            }
            // All memory was read before.
            (Finish::AtOnce(on_finish), None) if this.retrier().is_some() => on_finish(Ok(())),
            (Finish::AtOnce(_) | Finish::ByCaller, _) => {}
        }
        Ok(this)
    }

    /// Creates vCPU `number`.
    ///
    /// # Errors
    ///
    /// [`Error::CreateVcpu`], [`Error::Kick`] and [`Error::Ended`].
    pub fn create_vcpu(&self, number: u64) -> Result<LazyVcpu, Error> {
        let vcpu = self.inner.vm.create_vcpu(number);
        let vcpu = vcpu.map_err(|source| Error::CreateVcpu { number, source })?;
        self.inner.check()?;
        let vcpu = DemandVcpu::new(vcpu)?;
        let place = self.inner.vcpus.add(vcpu.kick().clone());
        let (handler, memory) = (self.inner.handler.clone(), self.address_space().clone());
        Ok(LazyVcpu::new(vcpu, place, handler, memory, self.hides_nested()))
    }

    /// Returns whether nested virtualization must be hidden from the guest, as
    /// [`LazyVcpu::set_cpuid2`] does.
    pub fn hides_nested(&self) -> bool {
        let known = self.inner.probe.as_ref().zip(self.engine());
        known.is_some_and(|(probe, engine)| probe.hides_nested(engine))
    }

    /// Fetches the pages of these addresses that lie in memory, and waits for them: those that KVM
    /// is about to touch on its own (see [`demand_kvm::own_pages`]). A [`LazyVcpu`] does that for
    /// the state that is set through it.
    ///
    /// # Errors
    ///
    /// [`Error::OwnPages`] and [`Error::Ended`].
    pub fn fetch_pages(&self, pages: &[GuestAddress]) -> Result<(), Error> {
        match self.inner.handler.fetch_pages(pages, &Waiter::new()) {
            Ok(()) => Ok(()),
            Err(FaultError::Stopped { .. }) => Err(Error::Ended),
            Err(error) => Err(Error::OwnPages(error)),
        }
    }

    /// Fetches the pages that nothing asks for in the background, until all are present or this
    /// handle is dropped. A fill that runs already is replaced. Regions that come later are filled,
    /// too.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`] and [`Error::Ended`].
    pub fn start_fill(&self, options: impl Into<FillOptions>) -> Result<(), Error> {
        self.inner.check()?;
        let mut filling = lock(&self.inner.fill);
        let before = filling.replace(Filling::start(&self.memory(), options.into())?);
        drop(filling);
        drop(before);
        Ok(())
    }

    /// Returns the number of bytes that background fill may keep in flight at present, if it was
    /// started: see [`Fill::in_flight_limit`](demand_memory::Fill::in_flight_limit).
    pub fn fill_in_flight_limit(&self) -> Option<u64> {
        lock(&self.inner.fill).as_ref().map(|filling| filling.fill().in_flight_limit())
    }

    /// Ends background fill, if it runs. Its thread makes no more requests.
    pub fn stop_fill(&self) {
        let fill = lock(&self.inner.fill).take();
        drop(fill);
    }

    /// Prepares for back-ends, which fault huge pages in as a whole: from now on such a page is
    /// created with its content, where this host allows that, and not zeroed first. Call it before
    /// a back-end gets the memory; [`share_with`](Self::share_with) does.
    pub fn expect_back_ends(&self) {
        self.inner.expects_back_ends.store(true, Ordering::Relaxed);
        // Arming the guest's mappings has done it.
        let known = self.inner.probe.as_ref().zip(self.engine());
        if !known.is_some_and(|(probe, engine)| probe.traps_own_accesses(engine)) {
            return;
        }
        self.memory().pagers().for_each(install_loader);
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Runs `act`, and tells it whether demand paging has been removed. Meanwhile it is not removed,
    /// and no region comes or goes.
    pub(crate) fn before_removal<T>(&self, act: impl FnOnce(Removed) -> T) -> T {
        let finished = lock(&self.inner.finished);
        act(if *finished { Removed::Yes } else { Removed::NotYet })
    }

    /// Adds a step that precedes the removal of demand paging, such as the end of post-copy of a
    /// back-end. It is called once the last page is present, on the thread of
    /// [`finish`](Self::finish), and must not block for good. If a step fails, the removal fails,
    /// and all steps are repeated by the next call of `finish`.
    pub fn before_finish(
        &self,
        step: impl FnMut() -> Result<(), Box<dyn StdError + Send + Sync>> + Send + 'static,
    ) {
        lock(&self.inner.before_finish).push(Box::new(step));
    }

    /// Calls `callback` when the last page is present: at once if it already is, else on the thread
    /// that publishes it. The callback must not block. Regions that come before then count, and
    /// regions that are removed do not. It is not called if the VM's handle is dropped first.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        self.inner.current.on_complete(callback);
    }

    /// Removes all that demand paging needed, once the last page is present: the steps of
    /// [`before_finish`](Self::before_finish), the traps and the threads of the fault service, the
    /// traps of the memslots, and the filter of MSRs, in this order. The VM then runs as if it had
    /// never been demand-paged. A thread of this VM calls it at that moment, unless the builder said
    /// [`finish_by_caller`](crate::LazyBuilder::finish_by_caller). It waits for back-ends and vCPUs,
    /// so never call it on a thread that serves faults. Further calls change nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], with nothing changed; [`Error::BeforeFinish`]; and the error of the
    /// removal that the kernel refuses.
    pub fn finish(&self) -> Result<(), Error> {
        self.inner.finish()
    }

    /// Returns whether demand paging has been removed, or never existed.
    pub fn is_finished(&self) -> bool {
        self.engine().is_none() || self.inner.finished.try_lock().is_ok_and(|finished| *finished)
    }

    /// Ends the guest, as dropping this does. The guest has ended when any call returns, also if
    /// two threads call it at once.
    pub fn end(&self) {
        self.inner.end();
    }

    /// Returns the VM.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.inner.vm
    }

    /// Returns the guest's memory as it is now, for accesses through vm-memory. A region that is
    /// removed stays in it, so do not keep it: [`address_space`](Self::address_space) follows.
    pub fn memory(&self) -> MemoryGuard {
        self.inner.current.get()
    }

    /// Returns the guest's memory as it is at each access, for devices: regions come and go in it at
    /// once for all.
    pub fn address_space(&self) -> &AddressSpace {
        self.inner.current.space()
    }

    /// Returns how vCPU accesses to missing pages are trapped; `None` if no page was missing when
    /// the VM got its memory.
    pub fn engine(&self) -> Option<Engine> {
        self.inner.engine
    }

    /// Returns the statistics of the memory.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.inner.stats
    }

    /// Returns the retrier of failed fetches; `None` if no page was ever missing.
    pub fn retrier(&self) -> Option<&Retrier> {
        self.inner.retrier.as_ref()
    }

    /// Returns whether fetches of some pages have failed and wait for their next attempt, or the
    /// source has left a page unanswered for ten seconds: see [`Retrier::is_failing`].
    pub fn is_source_failing(&self) -> bool {
        self.retrier().is_some_and(Retrier::is_failing)
    }

    /// Returns the service that handles faults, including those of back-ends.
    pub fn service(&self) -> &Arc<FaultService> {
        &self.inner.service
    }

    /// Returns the handler of the vCPUs' exits at missing pages, for a run loop of one's own.
    pub fn handler(&self) -> &Arc<FaultHandler> {
        &self.inner.handler
    }

    /// Returns the memslots of the memory, by guest address. There are none after the end. Do not
    /// keep them: a region whose memslot is held elsewhere cannot be removed.
    pub fn slots(&self) -> Vec<Arc<DemandSlot>> {
        lock(&self.inner.slots).clone()
    }
}

impl Drop for LazyVm {
    fn drop(&mut self) {
        if self.inner.process.is_current() {
            self.inner.end();
        } else {
            // The guest is the parent's. What a child inherits goes with it.
            std::mem::forget((self.inner.clone(), self.completion.take()));
        }
    }
}

impl fmt::Debug for LazyVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyVm")
            .field("engine", &self.inner.engine)
            .field("memory", &self.inner.current)
            .finish_non_exhaustive()
    }
}
