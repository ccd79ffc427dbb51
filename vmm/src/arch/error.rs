// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors of loading a guest, and of setting up, saving and restoring its machine.

use std::io;
use std::path::PathBuf;

use demand_memory::PAGE_SIZE;
use linux_loader::{cmdline, configurator, loader};
use vm_memory::GuestMemoryError;

use crate::arch::boot_part::BootPart;
use crate::arch::boot_room::NoRoom;
use crate::arch::layout::{ACPI_SIZE, ADDRESS_SIZES, MEMSLOT_MAX};
use crate::error::{Error, Kind};
use crate::report::size;

/// The hint for a state from a snapshot that KVM refuses.
const STATE_REFUSED: &str = "the snapshot may be damaged or from another kind of host, and the \
                             kernel's log may say more";

/// An error from loading a kernel or an initramfs.
#[derive(Debug, thiserror::Error)]
#[error("cannot load the {} {}: {fault}; {}", part.name(), path.display(), fault.remedy())]
pub struct BootFileError {
    pub(crate) part: BootPart,
    pub(crate) path: PathBuf,
    #[source]
    pub(crate) fault: BootFileFault,
}

impl BootFileError {
    /// Returns the cause.
    pub fn kind(&self) -> &BootFileFault {
        &self.fault
    }
}

impl From<BootFileError> for Error {
    fn from(error: BootFileError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// The fault of a kernel or an initramfs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootFileFault {
    /// It cannot be opened and read.
    #[error("{0}")]
    Open(#[source] io::Error),
    /// It is a directory or a pipe, for example.
    #[error("it is not a regular file")]
    NotRegular,
    /// It is too long.
    #[error("it has more than {most} bytes")]
    TooLong {
        /// The limit, in bytes.
        most: u64,
    },
    /// Its position cannot be set.
    #[error("{0}")]
    Rewind(#[source] io::Error),
    /// It cannot be read again.
    #[error("{0}")]
    Read(#[source] io::Error),
    /// The file of a snapshot differs from the state's record.
    #[error("it was altered after the snapshot")]
    AlteredInSnapshot,
    /// The file differs from the one that the guest booted from.
    #[error("it was altered after the guest's boot")]
    AlteredInUse,
    /// The kernel is shorter than any magic number.
    #[error("it is too short for a kernel")]
    Short,
    /// The kernel is neither a bzImage nor an ELF file.
    #[error("it is neither a bzImage nor an ELF file")]
    Unknown,
    /// The kernel is a bzImage or an ELF file, and its headers are wrong.
    #[error("it is damaged: {}", innermost(.0))]
    NotAKernel(#[source] loader::Error),
    /// A segment of an ELF kernel cannot be read into memory.
    #[error("a segment is missing from the file, or does not fit into memory")]
    Segment(#[source] loader::Error),
    /// The ELF kernel does not say where it starts.
    #[error("it is an ELF file without a PVH entry")]
    NoPvhEntry,
    /// The bzImage starts only in modes that the VMM does not set up.
    #[error("it has no 64-bit entry")]
    No64BitEntry,
    /// The bzImage is shorter than its header states.
    #[error("it is truncated: its header states {stated} bytes, the file has {len}")]
    Truncated {
        /// The length that the header states, in bytes.
        stated: u64,
        /// The file's length, in bytes.
        len: u64,
    },
    /// The kernel needs more memory than the guest has.
    #[error("it needs memory up to {end:#x}, and the guest's ends at {guests:#x}")]
    TooLarge {
        /// End of the memory that it needs.
        end: u64,
        /// End of the guest's memory.
        guests: u64,
    },
    /// The initramfs has no content.
    #[error("it is empty")]
    Empty,
    /// The initramfs does not fit beside the kernel.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The initramfs cannot be read into memory.
    #[error("{0}")]
    Copy(#[source] GuestMemoryError),
}

impl BootFileFault {
    /// Returns the hint for the user.
    fn remedy(&self) -> String {
        match self {
            BootFileFault::Open(_) | BootFileFault::NotRegular | BootFileFault::TooLong { .. } => {
                "name a readable file"
            }
            BootFileFault::Rewind(_) | BootFileFault::Truncated { .. } => "use another copy",
            BootFileFault::Read(_) => "check its disk",
            BootFileFault::AlteredInSnapshot => "use another copy of the snapshot",
            BootFileFault::AlteredInUse => {
                "do not write to a kernel or an initramfs in use; replace it with a new file"
            }
            BootFileFault::Short
            | BootFileFault::Unknown
            | BootFileFault::NotAKernel(_)
            | BootFileFault::NoPvhEntry
            | BootFileFault::No64BitEntry => {
                "name a bzImage, or an ELF vmlinux with a PVH entry (CONFIG_PVH)"
            }
            BootFileFault::Segment(_) => "use another copy, or give the guest more with --memory",
            BootFileFault::TooLarge { .. } => "give the guest more with --memory",
            BootFileFault::Empty => "name a cpio archive",
            BootFileFault::NoRoom(why) => return why.remedy(),
            BootFileFault::Copy(_) => "do not change the file while the VM starts",
        }
        .into()
    }
}

/// An error from loading a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The guest's memory is too small for any kernel.
    #[error("--memory: a Linux guest needs more than 1M; give it at least 64M")]
    LittleMemory,
    /// The kernel or the initramfs cannot be loaded.
    #[error(transparent)]
    File(#[from] BootFileError),
    /// The command line cannot be passed to the kernel.
    #[error("--cmdline: {source}; it takes printable ASCII, at most {most} bytes for this kernel")]
    CommandLine {
        /// The limit of the kernel, in bytes.
        most: usize,
        /// The cause.
        source: CommandLineFault,
    },
    /// `boot_params` cannot be written.
    #[error("cannot write Linux's boot parameters: {0}")]
    BootParams(#[source] configurator::Error),
    /// `hvm_start_info` cannot be written.
    #[error("cannot write PVH's start information: {0}")]
    StartInfo(#[source] configurator::Error),
}

impl From<LoadError> for Error {
    fn from(error: LoadError) -> Self {
        let kind = match error {
            LoadError::LittleMemory | LoadError::CommandLine { .. } => Kind::Usage,
            _ => Kind::Failed,
        };
        Error::of(kind, error)
    }
}

/// The fault of a kernel's command line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineFault {
    /// It has a character that is not allowed, or exceeds the room for it.
    #[error("{}", without_stop(.0))]
    Text(#[source] cmdline::Error),
    /// It is longer than the kernel's limit.
    #[error("it has {bytes} bytes")]
    TooLong {
        /// Its length, in bytes.
        bytes: usize,
    },
    /// It cannot be written to memory.
    #[error("{}", without_stop(.0))]
    Write(#[source] loader::Error),
}

/// Formats the cause of the kernel loader's error, without the prefix of each layer above it.
fn innermost(error: &loader::Error) -> String {
    let text = error.to_string();
    text.rsplit(": ").next().unwrap_or(&text).into()
}

/// Formats an error without the full stop at its end, as a part of a line.
fn without_stop(error: &impl std::fmt::Display) -> String {
    error.to_string().trim_end_matches('.').into()
}

/// An error from saving or restoring the state of a vCPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuStateError {
    /// KVM does not list its MSRs.
    #[error("cannot list the MSRs that KVM saves: {0}")]
    MsrList(#[source] kvm_ioctls::Error),
    /// The state has more CPUID leaves than KVM takes.
    #[error(
        "cannot restore a vCPU's CPUID: it has {leaves} leaves, and KVM takes {most}; the snapshot \
         is damaged, use another"
    )]
    Leaves {
        /// The number of leaves in the state.
        leaves: usize,
        /// The limit of KVM.
        most: usize,
    },
    /// KVM refuses to read or to reset a part of the state.
    #[error("cannot {verb} vCPU {cpu}, {part}: {source}; the kernel's log may say more")]
    Access {
        /// The operation.
        verb: &'static str,
        /// The vCPU.
        cpu: u32,
        /// The part of its state.
        part: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refuses a part of a snapshot's state.
    #[error("cannot restore vCPU {cpu}, {part}: {source}; {STATE_REFUSED}")]
    Refused {
        /// The vCPU.
        cpu: u32,
        /// The part of its state.
        part: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The TSC has another frequency here, and KVM cannot scale it.
    #[error(
        "cannot restore vCPU {cpu}: its TSC runs at {its} kHz, this host's at {ours} kHz, and KVM \
         cannot scale it: {source}; restore on a host of the same frequency"
    )]
    Frequency {
        /// The vCPU.
        cpu: u32,
        /// The frequency in the state, in kHz.
        its: u32,
        /// The frequency of this host, in kHz.
        ours: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The FPU's state is shorter than any processor's.
    #[error(
        "cannot restore vCPU {cpu}: its FPU state has {bytes} bytes, and the minimum is {least}; \
         the snapshot is damaged, use another"
    )]
    ShortXsave {
        /// The vCPU.
        cpu: u32,
        /// Length of the state, in bytes.
        bytes: usize,
        /// The minimum, in bytes.
        least: usize,
    },
    /// The FPU's state does not fit this processor.
    #[error(
        "cannot restore vCPU {cpu}: its FPU state has {bytes} bytes, and this host's has {room}; \
         restore on a host of the same kind"
    )]
    LongXsave {
        /// The vCPU.
        cpu: u32,
        /// Length of the state, in bytes.
        bytes: usize,
        /// Length of this host's state, in bytes.
        room: usize,
    },
    /// KVM refuses the value of an MSR.
    #[error(
        "cannot restore vCPU {cpu}: KVM refuses MSR {index:#x} with the value {data:#x}; restore \
         on a host of the same kind"
    )]
    Msr {
        /// The vCPU.
        cpu: u32,
        /// The MSR.
        index: u32,
        /// The value in the state.
        data: u64,
    },
}

impl From<VcpuStateError> for Error {
    fn from(error: VcpuStateError) -> Self {
        let kind = match error {
            VcpuStateError::Leaves { .. } | VcpuStateError::ShortXsave { .. } => Kind::Failed,
            _ => Kind::Host,
        };
        Error::of(kind, error)
    }
}

/// An error from saving or restoring the state of a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmStateError {
    /// KVM refuses an operation.
    #[error("cannot {verb} the VM's {part}: {source}; the kernel's log may say more")]
    Access {
        /// The operation.
        verb: &'static str,
        /// The part of the state.
        part: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refuses a part of a snapshot's state.
    #[error("cannot restore the VM's {part}: {source}; {STATE_REFUSED}")]
    Refused {
        /// The part of the state.
        part: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The state does not hold the wall clock.
    #[error(
        "cannot set the guest's clock by the host's: the snapshot does not say when it was taken; \
         use --clock keep"
    )]
    NoTime,
}

impl From<VmStateError> for Error {
    fn from(error: VmStateError) -> Self {
        let kind = match error {
            VmStateError::NoTime => Kind::Failed,
            _ => Kind::Host,
        };
        Error::of(kind, error)
    }
}

/// The reason for which this host cannot run a guest, according to CPUID.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// KVM does not return its CPUID.
    #[error("cannot read the CPUID that KVM supports: {0}")]
    Supported(#[source] kvm_ioctls::Error),
    /// The processors differ in something that no guest can ignore.
    #[error(
        "cannot restore: the guest's processor has {what} {its}, this host's has {ours}; restore \
         on a host with the same {what}"
    )]
    Differs {
        /// The vendor or the family.
        what: &'static str,
        /// The guest's.
        its: String,
        /// This host's.
        ours: String,
    },
    /// This host lacks features.
    #[error(
        "cannot restore: this host's KVM lacks features that the guest was told of: CPUID leaf \
         {leaf:#x}, subleaf {subleaf}, {register}, bits {}; restore on a host that has them",
        bits.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    Lacking {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The output register.
        register: &'static str,
        /// The bits.
        bits: Vec<u32>,
    },
    /// The XSAVE areas differ.
    #[error(
        "cannot restore: the guest's XSAVE area has state {state} at another place than this \
         host's (CPUID leaf 0xd, subleaf {state}); restore on a host of the same kind"
    )]
    Xsave {
        /// The state's number.
        state: u32,
    },
    /// The guest's physical addresses are wider.
    #[error(
        "cannot restore: the guest has physical addresses of {its} bits, this host has {ours} \
         (CPUID leaf {ADDRESS_SIZES:#x}, EAX); restore on a host that has as many"
    )]
    Width {
        /// The guest's width, in bits.
        its: u32,
        /// This host's width, in bits.
        ours: u32,
    },
}

impl From<CpuidError> for Error {
    fn from(error: CpuidError) -> Self {
        Error::of(Kind::Host, error)
    }
}

/// The reason for which no machine on this host can have a guest's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// A piece does not fit into a memslot.
    #[error(
        "--memory: size={} puts {bytes} bytes at guest address {start:#x}: a memslot of KVM holds \
         at most {MEMSLOT_MAX}; ask for at most {}",
        size(*total), size(MEMSLOT_MAX + PAGE_SIZE)
    )]
    Memslot {
        /// Size of the memory, in bytes.
        total: u64,
        /// Size of the piece, in bytes.
        bytes: u64,
        /// Guest physical address of the piece.
        start: u64,
    },
    /// The memory reaches addresses that the processor does not have.
    #[error(
        "--memory: size={} reaches guest address {last:#x}, and this processor has {bits} bits of \
         physical address; ask for less",
        size(*total)
    )]
    Reach {
        /// Size of the memory, in bytes.
        total: u64,
        /// Guest physical address of the last byte.
        last: u64,
        /// Width of the processor's physical addresses, in bits.
        bits: u32,
    },
}

impl From<PlacementError> for Error {
    fn from(error: PlacementError) -> Self {
        Error::of(Kind::Host, error)
    }
}

/// An error from setting up what a guest's kernel finds at its start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The ACPI tables do not fit.
    #[error(
        "cannot describe {devices} devices and {cpus} vCPUs to the guest: the ACPI tables would \
         take {bytes} of {ACPI_SIZE} bytes; ask for fewer"
    )]
    AcpiSize {
        /// The number of devices.
        devices: usize,
        /// The number of vCPUs.
        cpus: u32,
        /// Size of the tables, in bytes.
        bytes: usize,
    },
    /// The ACPI tables cannot be written to memory.
    #[error("cannot write the ACPI tables: {0}")]
    Acpi(#[source] GuestMemoryError),
    /// KVM refuses the first vCPU's registers.
    #[error("cannot set up the first vCPU: {0}")]
    Registers(#[source] kvm_ioctls::Error),
    /// The first vCPU's descriptors and page tables cannot be written to memory.
    #[error("cannot write the first vCPU's tables: {0}")]
    Tables(#[source] GuestMemoryError),
}

impl From<BootError> for Error {
    fn from(error: BootError) -> Self {
        let kind = match error {
            BootError::AcpiSize { .. } => Kind::Usage,
            BootError::Registers(_) => Kind::Host,
            BootError::Acpi(_) | BootError::Tables(_) => Kind::Failed,
        };
        Error::of(kind, error)
    }
}
