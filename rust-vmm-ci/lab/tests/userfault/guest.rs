// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that loads or stores one word at a time, in memory that its test makes present page by
//! page.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use bare_guest::{Mode, start_at};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, kvm_create_guest_memfd, kvm_pre_fault_memory,
    kvm_regs, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use test_support::host::{skip, skip_without_patch};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// The flags of a memslot under test.
pub const USERFAULT: u32 = 1 << 3;
pub const LOG: u32 = KVM_MEM_LOG_DIRTY_PAGES;

/// Flag of a memory-fault exit: the page's bit in the bitmap is set.
pub const EXIT_USERFAULT: u64 = 1 << 4;

pub const PAGE: usize = 4096;
/// Number of pages in one 2M unit, and in the memory under test.
pub const UNIT_PAGES: usize = 512;
pub const PAGES: usize = 2 * UNIT_PAGES;

/// Address of the memory under test: naturally aligned, and beyond the reach of real mode unless
/// the segment limit is raised.
pub const MEMORY_GPA: u64 = 2 << 20;
/// Address of the code slot, which holds the programs and everything else that is present from the
/// start.
pub const CODE_GPA: u64 = 0x1000;
const CODE_PAGES: usize = 64;
const CODE_SLOT: u32 = 0;
pub const MEMORY_SLOT: u32 = 1;

/// `mov eax, [ebx]; hlt` and, from 16 on, `mov [ebx], eax; hlt`, in 16-bit code.
const LOAD: [u8; 5] = [0x67, 0x66, 0x8b, 0x03, 0xf4];
const STORE: [u8; 5] = [0x67, 0x66, 0x89, 0x03, 0xf4];
const STORE_OFFSET: usize = 16;

vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, 0xae, 0xd5, kvm_pre_fault_memory);

/// The backing of the memory under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// shmem, with huge pages if the kernel supports them.
    Shmem,
    /// hugetlb with 2M pages.
    Hugetlb,
    /// A guest_memfd that user space maps.
    GuestMemfd,
}

/// The capability that tells the flags of guest_memfd, and the flags: user space may map the file,
/// and all of it is shared.
const CAP_GUEST_MEMFD_FLAGS: libc::c_ulong = 244;
pub const GUEST_MEMFD_MMAP: u64 = 1;
const GUEST_MEMFD_MAPPED: u64 = GUEST_MEMFD_MMAP | 2;

impl Backing {
    /// Returns whether KVM can log the pages that a guest writes.
    pub fn logs(self) -> bool {
        self != Backing::GuestMemfd
    }
}

/// Creates a guest_memfd.
pub fn guest_memfd(vm: &VmFd, length: usize, flags: u64) -> Result<OwnedFd, errno::Error> {
    let request = kvm_create_guest_memfd { size: length as u64, flags, ..Default::default() };
    let fd = vm.create_guest_memfd(request)?;
    // SAFETY: the descriptor is new, so no other code owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The outcome of an access.
#[derive(Debug, PartialEq, Eq)]
pub enum Access {
    /// The access completed, with this value in eax.
    Done(u32),
    /// KVM exited because this page is missing.
    Missing(usize),
    /// KVM_RUN failed with EFAULT, without further information.
    Unexplained,
}

/// A mapping of a memfd.
pub struct Shared {
    fd: OwnedFd,
    address: *mut u8,
    length: usize,
}

// SAFETY: it owns its mapping, whose address is the same on every thread, and accesses of several
// threads to the memory are no business of the mapping's owner: guests access it at any time.
unsafe impl Send for Shared {}

impl Shared {
    pub fn new(backing: Backing, length: usize) -> io::Result<Self> {
        let flags = match backing {
            Backing::Shmem => 0,
            Backing::Hugetlb => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            // It belongs to a VM.
            Backing::GuestMemfd => return Err(io::ErrorKind::Unsupported.into()),
        };
        // SAFETY: the name is a valid C string.
        let fd = unsafe { libc::memfd_create(c"userfault".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, so no other code owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the call takes only a descriptor and a number.
        let sized = unsafe { libc::ftruncate(fd.as_raw_fd(), length.cast_signed() as i64) };
        if sized != 0 {
            return Err(io::Error::last_os_error());
        }
        let shared = Self { address: Self::map(&fd, length)?, fd, length };
        if backing == Backing::Shmem {
            // SAFETY: the range is exactly this mapping. An error only means small pages.
            unsafe { libc::madvise(shared.address.cast(), length, libc::MADV_HUGEPAGE) };
        }
        Ok(shared)
    }

    /// Maps memory of a VM's guest_memfd. Returns `None` on a kernel that refuses such files.
    fn of_guest(vm: &VmFd, length: usize) -> Option<Self> {
        let known = vm.check_extension_raw(CAP_GUEST_MEMFD_FLAGS) as u64;
        match guest_memfd(vm, length, GUEST_MEMFD_MAPPED) {
            Ok(fd) => {
                assert_eq!(known & GUEST_MEMFD_MAPPED, GUEST_MEMFD_MAPPED);
                let address = Self::map(&fd, length).expect("mapped");
                Some(Self { address, fd, length })
            }
            // Before 6.18 no flag is known, and before 6.8 not the ioctl.
            Err(error) => {
                assert!([libc::EINVAL, libc::ENOTTY].contains(&error.errno()), "{error}");
                assert_eq!(known & GUEST_MEMFD_MMAP, 0);
                None
            }
        }
    }

    /// Removes all pages from the memory object.
    pub fn empty(&self) {
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no reference into the memory exists, and its content no longer matters.
        let result = unsafe {
            libc::fallocate(self.fd.as_raw_fd(), how, 0, self.length.cast_signed() as i64)
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// Returns whether the memory object has a page.
    pub fn has(&self, page: usize) -> bool {
        assert!((page + 1) * PAGE <= self.length);
        let mut state = 0;
        // SAFETY: the page lies in the mapping, and the call writes one byte, to `state`.
        let result =
            unsafe { libc::mincore(self.address.add(page * PAGE).cast(), PAGE, &raw mut state) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        state & 1 == 1
    }

    /// Maps the same memory a second time, as another process would.
    pub fn again(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self { address: Self::map(&fd, self.length)?, fd, length: self.length })
    }

    /// Maps a file at a multiple of 2M, as huge pages require.
    fn map(fd: &OwnedFd, length: usize) -> io::Result<*mut u8> {
        let align = UNIT_PAGES * PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice does not affect existing
        // memory.
        let space = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length + align,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if space == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let offset = space.cast::<u8>().align_offset(align);
        // SAFETY: the aligned range lies within the space reserved above, which no other code uses.
        let address = unsafe {
            libc::mmap(
                space.cast::<u8>().add(offset).cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(address.cast())
    }

    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Makes the memory inaccessible, as if it were unmapped.
    pub fn forbid(&self) {
        // SAFETY: the range is exactly this mapping, and the tests do not access it afterwards.
        let result = unsafe { libc::mprotect(self.address.cast(), self.length, libc::PROT_NONE) };
        assert_eq!(result, 0);
    }

    /// Writes bytes at an offset, while the guest does not run.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length);
        // SAFETY: the assertion keeps the range within the mapping, to which no reference exists.
        unsafe {
            let to = self.address.add(offset);
            ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Reads bytes at an offset.
    pub fn get(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.length);
        let mut bytes = vec![0; length];
        // SAFETY: as for `put`.
        unsafe {
            let from = self.address.add(offset);
            ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), length);
        }
        bytes
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index * 8 < self.length);
        // SAFETY: the assertion keeps the word within the mapping, which lives as long as `self`,
        // and it is aligned. Atomic accesses are sound for memory that the guest and KVM share.
        unsafe { AtomicU64::from_ptr(self.address.cast::<u64>().add(index)) }
    }

    pub fn set(&self, bit: usize) {
        self.word(bit / 64).fetch_or(1 << (bit % 64), Ordering::Release);
    }

    pub fn clear(&self, bit: usize) {
        self.word(bit / 64).fetch_and(!(1 << (bit % 64)), Ordering::Release);
    }

    /// Returns the first word of a page.
    pub fn page(&self, page: usize) -> &AtomicU64 {
        self.word(page * PAGE / 8)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

/// A virtual machine with the memory under test in a separate slot.
pub struct Guest {
    // Declared before the memory, so that it is dropped first.
    pub vcpu: VcpuFd,
    pub vm: VmFd,
    pub code: Shared,
    pub memory: Shared,
    pub bitmap: Shared,
    backing: Backing,
}

/// Returns the first word of a missing page, which no guest may ever read.
pub fn unarrived(page: usize) -> u32 {
    0xbad0_0000 | page as u32
}

/// Returns the first word of a present page.
pub fn content(page: usize) -> u32 {
    0x600d_0000 | page as u32
}

impl Guest {
    /// Creates a guest whose pages are all missing (their bits are set) although the memory already
    /// has other content. Returns `None` if this host has no suitable KVM, after printing the
    /// reason; for a kernel without a guest_memfd that can be mapped, after checking that it refuses
    /// one.
    pub fn new(backing: Backing, flags: u32) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                skip(&format!("/dev/kvm: {error}"));
                return None;
            }
        };
        if backing == Backing::Shmem {
            // Only root can write this; otherwise shmem uses small pages.
            let _ = fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise");
        }
        let vm = kvm.create_vm().expect("vm");
        let memory = match backing {
            Backing::GuestMemfd => Shared::of_guest(&vm, PAGES * PAGE)?,
            _ => match Shared::new(backing, PAGES * PAGE) {
                Ok(memory) => memory,
                Err(error) => {
                    skip(&format!("memory in {backing:?}: {error}"));
                    return None;
                }
            },
        };
        let bitmap = Shared::new(Backing::Shmem, PAGE).expect("bitmap");
        let code = Shared::new(Backing::Shmem, CODE_PAGES * PAGE).expect("code");
        code.put(0, &LOAD);
        code.put(STORE_OFFSET, &STORE);
        let region = kvm_userspace_memory_region {
            slot: CODE_SLOT,
            flags: 0,
            guest_phys_addr: CODE_GPA,
            memory_size: (CODE_PAGES * PAGE) as u64,
            userspace_addr: code.address(),
        };
        // SAFETY: the guest keeps the mapping until the VM is dropped.
        unsafe { vm.set_user_memory_region(region) }.expect("code slot");
        let vcpu = vm.create_vcpu(0).expect("vcpu");
        let cpuid = bare_guest::cpuid(&kvm, 0).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("CPUID");
        Mode::Real.set(&vcpu).expect("real mode");
        let guest = Self { vcpu, vm, code, memory, bitmap, backing };
        for page in 0..PAGES {
            guest.memory.page(page).store(unarrived(page).into(), Ordering::Relaxed);
            guest.bitmap.set(page);
        }
        // Support for the ABI can only be detected by trying. Before 6.8 the ioctl is missing.
        match guest.set_flags(USERFAULT) {
            Err(error) if [libc::EINVAL, libc::ENOTTY].contains(&error.errno()) => {
                skip_without_patch(&format!("KVM_MEM_USERFAULT on {backing:?}"));
                return None;
            }
            result => result.expect("slot with KVM_MEM_USERFAULT"),
        }
        if flags != USERFAULT {
            guest.remove_slot();
            guest.set_flags(flags).expect("slot");
        }
        Some(guest)
    }

    pub fn region(&self, flags: u32) -> kvm_userspace_memory_region2 {
        let mut region = kvm_userspace_memory_region2 {
            slot: MEMORY_SLOT,
            flags,
            guest_phys_addr: MEMORY_GPA,
            memory_size: (PAGES * PAGE) as u64,
            userspace_addr: self.memory.address(),
            ..Default::default()
        };
        // The field userfault_bitmap, which kvm-bindings does not define.
        region.pad2[0] = self.bitmap.address();
        if self.backing == Backing::GuestMemfd {
            region.flags |= KVM_MEM_GUEST_MEMFD;
            region.guest_memfd = self.memory.fd.as_raw_fd().cast_unsigned();
        }
        region
    }

    pub fn set_region(&self, region: kvm_userspace_memory_region2) -> Result<(), errno::Error> {
        // SAFETY: regions come from `region`, so they describe mappings that live as long as the
        // VM, or KVM refuses them.
        unsafe { self.vm.set_user_memory_region2(region) }
    }

    pub fn set_flags(&self, flags: u32) -> Result<(), errno::Error> {
        self.set_region(self.region(flags))
    }

    /// Sets the flags through the older ioctl, which has no bitmap.
    pub fn set_flags_by_old_ioctl(&self, flags: u32) -> Result<(), errno::Error> {
        let region = self.region(flags);
        let region = kvm_userspace_memory_region {
            slot: region.slot,
            flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: as in `set_region`.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// Gives vCPUs in SMM, which have slots of their own, the same memory.
    pub fn add_slots_in_smm(&self) {
        const IN_SMM: u32 = 1 << 16;
        let mut region = self.region(USERFAULT);
        region.slot |= IN_SMM;
        // A part of a guest_memfd belongs to one slot. The other reaches it through the mapping.
        region.flags = USERFAULT;
        self.set_region(region).expect("slot");
        (region.slot, region.flags) = (CODE_SLOT | IN_SMM, 0);
        (region.guest_phys_addr, region.userspace_addr) = (CODE_GPA, self.code.address());
        region.memory_size = (CODE_PAGES * PAGE) as u64;
        self.set_region(region).expect("slot");
    }

    pub fn remove_slot(&self) {
        let mut region = self.region(0);
        region.memory_size = 0;
        self.set_region(region).expect("slot removed");
    }

    /// Publishes a page: the content first, then the bit.
    pub fn arrive(&self, page: usize) {
        self.memory.page(page).store(content(page).into(), Ordering::Relaxed);
        self.bitmap.clear(page);
    }

    pub fn load(&mut self, page: usize) -> Access {
        Self::load_on(&mut self.vcpu, page)
    }

    /// Loads from a page while another thread uses the rest of the guest.
    pub fn load_on(vcpu: &mut VcpuFd, page: usize) -> Access {
        Self::start(vcpu, 0, page, 0);
        Self::resume_on(vcpu)
    }

    pub fn store(&mut self, page: usize, value: u32) -> Access {
        Self::start(&self.vcpu, STORE_OFFSET, page, value);
        self.resume()
    }

    fn start(vcpu: &VcpuFd, offset: usize, page: usize, value: u32) {
        let regs = kvm_regs {
            rbx: MEMORY_GPA + (page * PAGE) as u64,
            rax: value.into(),
            ..start_at(CODE_GPA + offset as u64)
        };
        vcpu.set_regs(&regs).expect("regs");
    }

    /// Resumes the guest.
    pub fn resume(&mut self) -> Access {
        Self::resume_on(&mut self.vcpu)
    }

    fn resume_on(vcpu: &mut VcpuFd) -> Access {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => Access::Done(vcpu.get_regs().expect("regs").rax as u32),
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                assert_eq!(flags, EXIT_USERFAULT);
                assert_eq!(size, PAGE as u64);
                assert_eq!(gpa % PAGE as u64, 0);
                Access::Missing(usize::try_from(gpa - MEMORY_GPA).expect("64 bits") / PAGE)
            }
            Ok(other) => panic!("unexpected exit {other:?}"),
            Err(error) if error.errno() == libc::EFAULT => Access::Unexplained,
            Err(error) => panic!("KVM_RUN: {error}"),
        }
    }

    /// Asks KVM to map a page before it is accessed.
    pub fn pre_fault(&mut self, page: usize) -> Result<(), errno::Error> {
        let mut range = kvm_pre_fault_memory {
            gpa: MEMORY_GPA + (page * PAGE) as u64,
            size: PAGE as u64,
            ..Default::default()
        };
        // SAFETY: `range` is the structure that this ioctl reads and writes.
        match unsafe { ioctl_with_mut_ref(&self.vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) } {
            0 => Ok(()),
            _ => Err(errno::Error::last()),
        }
    }

    /// Returns the pages that KVM has logged as dirty since the last call.
    pub fn dirty(&self) -> Vec<usize> {
        let log = self.vm.get_dirty_log(MEMORY_SLOT, PAGES * PAGE).expect("dirty log");
        (0..PAGES).filter(|page| log[page / 64] >> (page % 64) & 1 == 1).collect()
    }

    /// Returns the number of this VM's huge mappings, from KVM's counter.
    pub fn huge_mappings(&self) -> u64 {
        // The folder is named after the thread that created the VM, which is the test's.
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        let folder = format!("/sys/kernel/debug/kvm/{thread}-{}", self.vm.as_raw_fd());
        let text = fs::read_to_string(format!("{folder}/pages_2m")).expect("KVM's counters");
        text.trim().parse().expect("a number")
    }
}
