// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loads a Linux kernel, its initramfs and its boot parameters into guest memory.
//!
//! Sources: `Documentation/arch/x86/boot.rst` for bzImage, Xen's `docs/misc/pvh.pandoc` for ELF.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use demand_memory::{DemandMemory, to_usize};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{
    self, BzImage, Elf, KernelLoader, KernelLoaderResult, elf, load_cmdline,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::boot_files::{BootFile, BootSource};
use crate::arch::boot_room::{self, KernelRoom};
use crate::arch::error::{BootFileError, BootFileFault, CommandLineFault, LoadError};
use crate::arch::layout::{
    ACPI, COMMAND_LINE, COMMAND_LINE_MAX, HIGH_START, LOW_END, PVH_START_INFO, ZERO_PAGE,
};
use crate::arch::placement::LOW_MEMORY_END;

/// The entry point of the first processor, and its boot protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 64-bit mode, with the address of `boot_params` in RSI.
    Linux64(GuestAddress),
    /// 32-bit protected mode, with the address of `hvm_start_info` in EBX.
    Pvh(GuestAddress),
}

/// A memory type of `boot_params` (`arch/x86/include/asm/e820/types.h`): usable by the guest.
const E820_RAM: u32 = 1;
/// A memory type of `boot_params`: not usable by the guest.
const E820_RESERVED: u32 = 2;
/// The type of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Bit of `loadflags`: the heap may be used.
const CAN_USE_HEAP: u8 = 0x80;
/// Bit of `xloadflags`: the kernel has a 64-bit entry, 0x200 bytes from its start.
const XLF_KERNEL_64: u16 = 1;
/// The first version of the boot protocol with `xloadflags`.
const WITH_XLOADFLAGS: u16 = 0x20c;
/// Offset in a bzImage of the field `boot_flag`, in bytes. Four bytes later lies `header`.
const BOOT_FLAG: u64 = 0x1fe;
/// Offset of the 64-bit entry, in bytes.
const ENTRY_64: u64 = 0x200;
/// Bytes of the command line, without the NUL, that Linux keeps on x86 unless the kernel states
/// another limit (`arch/x86/include/asm/setup.h`, `COMMAND_LINE_SIZE`). Linux cuts off the rest.
const LINUX_KEEPS: usize = 2047;
/// The magic number of `hvm_start_info`, and its first version with a memory map.
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;

/// Checks that memory is large enough for any Linux guest.
///
/// # Errors
///
/// Returns a one-line error.
pub(crate) fn check_size(memory: &DemandMemory) -> Result<(), LoadError> {
    if low_end(memory) > HIGH_START.0 {
        return Ok(());
    }
    Err(LoadError::LittleMemory)
}

/// Loads the files of `source` and the boot parameters. It waits for each page that it writes to
/// and that is missing. The caller writes the ACPI tables.
///
/// # Errors
///
/// Returns a one-line error that names the file: it cannot be read, is not a kernel, or does not
/// fit into memory.
pub(crate) fn load(memory: &DemandMemory, source: &BootSource) -> Result<Entry, LoadError> {
    check_size(memory)?;
    let (loaded, room, pvh) = load_kernel(memory, &source.kernel)?;
    let unpacked = boot_room::unpacked(&source.cmdline);
    let initramfs = source
        .initramfs
        .as_ref()
        .map(|file| load_initramfs(memory, file, room, unpacked))
        .transpose()?;
    let cmdline_size = load_command_line(
        memory,
        &source.cmdline,
        loaded.setup_header.as_ref().map(|header| header.cmdline_size),
    )?;
    match pvh {
        Some(entry) => {
            write_start_info(memory, initramfs)?;
            Ok(Entry::Pvh(entry))
        }
        None => {
            write_zero_page(memory, &loaded, initramfs, cmdline_size)?;
            Ok(Entry::Linux64(GuestAddress(loaded.kernel_load.0 + ENTRY_64)))
        }
    }
}

/// Loads the kernel. Returns its size in memory, and the PVH entry if it is an ELF image.
fn load_kernel(
    memory: &DemandMemory,
    kernel: &BootFile,
) -> Result<(KernelLoaderResult, KernelRoom, Option<GuestAddress>), BootFileError> {
    let refused = |fault| kernel.cannot_load(fault);
    let (mut file, len) = (kernel.rewound()?, kernel.size());
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(|_| refused(BootFileFault::Short))?;
    if magic != *b"\x7fELF"
        && !is_bzimage(file).map_err(|error| refused(BootFileFault::Read(error)))?
    {
        return Err(refused(BootFileFault::Unknown));
    }
    if magic == *b"\x7fELF" {
        let loaded =
            Elf::load(memory, None, &mut file, Some(HIGH_START)).map_err(|error| match error {
                loader::Error::Elf(elf::Error::ReadKernelImage) => {
                    refused(BootFileFault::Segment(error))
                }
                error => refused(BootFileFault::NotAKernel(error)),
            })?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(refused(BootFileFault::NoPvhEntry));
        };
        // This end includes the parts that are not in the file, such as .bss, which the kernel
        // clears as it starts.
        if loaded.kernel_end > low_end(memory) {
            return Err(too_large(memory, kernel, loaded.kernel_end));
        }
        let room = KernelRoom { end: loaded.kernel_end, reach: LOW_MEMORY_END };
        return Ok((loaded, room, Some(entry)));
    }
    // The file is longer than the kernel proper, but shorter than the unpacked kernel.
    if HIGH_START.0.saturating_add(len) > low_end(memory) {
        return Err(too_large(memory, kernel, HIGH_START.0.saturating_add(len)));
    }
    let loaded = BzImage::load(memory, None, &mut file, Some(HIGH_START))
        .map_err(|error| refused(BootFileFault::NotAKernel(error)))?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.version < WITH_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(refused(BootFileFault::No64BitEntry));
    }
    let stated = bzimage_len(&header);
    if len < stated {
        return Err(refused(BootFileFault::Truncated { stated, len }));
    }
    let room = KernelRoom::of_bzimage(&header, HIGH_START.0, len);
    if room.end > low_end(memory) {
        return Err(too_large(memory, kernel, room.end));
    }
    Ok((loaded, room, None))
}

/// Returns whether a file has the magic numbers of a bzImage's header.
fn is_bzimage(mut file: &File) -> io::Result<bool> {
    let mut numbers = [0; 8];
    file.seek(SeekFrom::Start(BOOT_FLAG))?;
    let mut is = false;
    match file.read_exact(&mut numbers) {
        Ok(()) => is = numbers[..2] == [0x55, 0xaa] && numbers[4..] == *b"HdrS",
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => return Err(error),
    }
    Ok(is)
}

fn too_large(memory: &DemandMemory, kernel: &BootFile, end: u64) -> BootFileError {
    kernel.cannot_load(BootFileFault::TooLarge { end, guests: low_end(memory) })
}

/// Returns the length of a bzImage according to its header: the boot sector, the set-up code, and
/// the kernel proper in units of 16 bytes (`Documentation/arch/x86/boot.rst`, `setup_sects` and
/// `syssize`).
fn bzimage_len(header: &setup_header) -> u64 {
    let sectors = match header.setup_sects {
        0 => 4,
        some => u64::from(some),
    };
    (sectors + 1) * 512 + u64::from(header.syssize) * 16
}

/// Returns the end of the region that starts at address 0.
fn low_end(memory: &DemandMemory) -> u64 {
    let first = memory.find_region(GuestAddress(0));
    first.map_or(0, |region| region.last_addr().0 + 1)
}

/// The address of the initramfs, and its length in bytes.
type Initramfs = (GuestAddress, u64);

/// Loads the initramfs as high as the kernel can reach it; see [`KernelRoom::place`].
fn load_initramfs(
    memory: &DemandMemory,
    file: &BootFile,
    room: KernelRoom,
    unpacked: u64,
) -> Result<Initramfs, BootFileError> {
    let size = file.size();
    if size == 0 {
        return Err(file.cannot_load(BootFileFault::Empty));
    }
    let total = memory.iter().map(|region| region.len()).sum();
    let start = room
        .place(size, unpacked, low_end(memory), total)
        .map_err(|why| file.cannot_load(why.into()))?;
    let address = GuestAddress(start);
    memory
        .read_exact_volatile_from(address, &mut file.rewound()?, to_usize(size))
        .map_err(|error| file.cannot_load(BootFileFault::Copy(error)))?;
    Ok((address, size))
}

/// Writes the command line and returns its length with the NUL. `kernels` is the kernel's stated
/// limit, without the NUL.
fn load_command_line(
    memory: &DemandMemory,
    text: &str,
    kernels: Option<u32>,
) -> Result<u32, LoadError> {
    let most = kernels.map_or(LINUX_KEEPS, |most| to_usize(most.into())).min(COMMAND_LINE_MAX - 1);
    let wrong = |source| LoadError::CommandLine { most, source };
    let text_fault = |error| wrong(CommandLineFault::Text(error));
    let mut line = Cmdline::new(COMMAND_LINE_MAX).map_err(text_fault)?;
    if !text.is_empty() {
        line.insert_str(text).map_err(text_fault)?;
    }
    let bytes = line.as_cstring().map_err(text_fault)?.as_bytes().len();
    if bytes > most {
        return Err(wrong(CommandLineFault::TooLong { bytes }));
    }
    load_cmdline(memory, COMMAND_LINE, &line)
        .map_err(|error| wrong(CommandLineFault::Write(error)))?;
    Ok(u32::try_from(bytes + 1).expect("the limit is far below 2^32"))
}

/// Returns the guest's memory map: start, length and type of each range.
fn memory_map(memory: &DemandMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_END, E820_RAM),
        (LOW_END, HIGH_START.0 - LOW_END, E820_RESERVED),
        (HIGH_START.0, low_end(memory) - HIGH_START.0, E820_RAM),
    ];
    let above = memory.iter().filter(|region| region.start_addr() > HIGH_START);
    map.extend(above.map(|region| (region.start_addr().0, region.len(), E820_RAM)));
    map
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "Linux is loaded, with few ranges of memory, below 4 GiB"
)]
fn write_zero_page(
    memory: &DemandMemory,
    kernel: &KernelLoaderResult,
    initramfs: Option<Initramfs>,
    cmdline_size: u32,
) -> Result<(), LoadError> {
    let mut params =
        boot_params { hdr: kernel.setup_header.unwrap_or_default(), ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= CAN_USE_HEAP;
    params.hdr.cmd_line_ptr = COMMAND_LINE.0 as u32;
    params.hdr.cmdline_size = cmdline_size;
    if let Some((address, size)) = initramfs {
        params.hdr.ramdisk_image = address.0 as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    params.acpi_rsdp_addr = ACPI.0;
    let map = memory_map(memory);
    for (slot, &(addr, size, type_)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr, size, r#type: type_ };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, ZERO_PAGE), memory)
        .map_err(LoadError::BootParams)
}

fn write_start_info(memory: &DemandMemory, initramfs: Option<Initramfs>) -> Result<(), LoadError> {
    let map: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let module = initramfs.map(|(address, size)| hvm_modlist_entry {
        paddr: address.0,
        size,
        ..Default::default()
    });
    let modules = PVH_START_INFO.unchecked_add(0x100);
    let table = PVH_START_INFO.unchecked_add(0x200);
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        nr_modules: module.is_some().into(),
        modlist_paddr: if module.is_some() { modules.0 } else { 0 },
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: ACPI.0,
        memmap_paddr: table.0,
        memmap_entries: u32::try_from(map.len()).expect("the memory has few ranges"),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, PVH_START_INFO);
    params.set_sections(&map, table);
    if let Some(module) = module {
        params.set_modules(&[module], modules);
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(LoadError::StartInfo)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use demand_memory::{
        BackingKind, DemandRegion, MemfdBacking, PagerConfig, Retrier, RetryPolicy, Stats,
    };
    use demand_source::LocalFile;
    use test_support::elf;

    use crate::arch::boot_part::BootPart;

    const MEMORY: u64 = 16 << 20;

    fn memory() -> DemandMemory {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(MEMORY).unwrap();
        let config = PagerConfig {
            backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, MEMORY).unwrap()),
            source: Arc::new(LocalFile::open(image.path()).unwrap()),
            image_offset: 0,
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        };
        DemandMemory::new(vec![DemandRegion::new(GuestAddress(0), config, ()).unwrap()]).unwrap()
    }

    #[test]
    fn elf_kernels_memory_size_must_fit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let room = MEMORY - HIGH_START.0;
        let load = |size| {
            std::fs::write(file.path(), elf::with_pvh_entry(HIGH_START.0, Some(size), &[]))
                .unwrap();
            let kernel = BootFile::open(BootPart::Kernel, file.path(), &|| false).unwrap();
            load_kernel(&memory(), &kernel).map_err(|error| error.to_string())
        };
        let (_, taken, entry) = load(room).unwrap();
        assert_eq!(taken, KernelRoom { end: MEMORY, reach: LOW_MEMORY_END });
        assert_eq!(entry, Some(HIGH_START.unchecked_add(elf::CODE)));
        for (size, end) in [(room + 1, "0x1000001"), (1 << 40, "0x10000100000")] {
            let error = load(size).unwrap_err();
            for words in ["load the kernel", end, "ends at 0x1000000;", "--memory"] {
                assert!(error.contains(words), "{error}");
            }
        }
    }

    #[test]
    fn command_line_beyond_kernels_limit_is_refused() {
        let memory = memory();
        // An ELF kernel states no limit.
        for (kernels, most) in [(None, 2047), (Some(2047), 2047), (Some(255), 255)] {
            let load = |len: usize| load_command_line(&memory, &"x".repeat(len), kernels);
            assert_eq!(load(most).unwrap() as usize, most + 1);
            for len in [most + 1, 9000, 100_000] {
                let error = load(len).unwrap_err().to_string();
                assert!(error.contains(&format!("at most {most} bytes")), "{error}");
            }
        }
        assert_eq!(load_command_line(&memory, "", None).unwrap(), 1);
    }
}
