// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Measures the VMM's own accesses to guest memory, through vm-memory.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use demand_memory::{
    Backing, BackingKind, DemandMemory, DemandRegion, MemfdBacking, PAGE_SIZE, PagerConfig,
    Retrier, Stats,
};
use demand_source::LocalFile;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::table::{Row, Target};

const PART: &str = "host";
const ROUNDS: usize = 32;
/// Rounds of accesses to present pages, which are so short that the median of fewer pairs does not
/// repeat.
const PAIRED_ROUNDS: usize = 101;
/// Number of accesses timed together: few enough that a busy machine interrupts only few samples.
const BATCH: usize = 1000;

/// Returns the rows for memory of `size` bytes.
pub(crate) fn rows(backing: BackingKind, size: u64, image: &Path) -> Result<Vec<Row>> {
    let mut rows = vec![missing(backing, size, image)?];
    rows.extend(present(backing, size, image)?);
    Ok(rows)
}

fn memory(backing: &Arc<MemfdBacking>, image: &Path) -> Result<DemandMemory> {
    let config = PagerConfig {
        backing: backing.clone(),
        source: Arc::new(LocalFile::open(image)?),
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(Default::default(), |failure| eprintln!("{}", failure.error)),
    };
    Ok(DemandMemory::new(vec![DemandRegion::new(GuestAddress(0), config, ())?])?)
}

/// Measures the first access to each page, which fetches it.
fn missing(kind: BackingKind, size: u64, image: &Path) -> Result<Row> {
    let speed = |elapsed: std::time::Duration| (size / PAGE_SIZE) as f64 / elapsed.as_secs_f64();
    let mut pairs = Vec::new();
    for round in 0..ROUNDS {
        // Each comes first equally often.
        let bare = (round % 2 == 1).then(|| pread_loop(kind, size, image)).transpose()?;
        let backing = Arc::new(MemfdBacking::new(kind, size)?);
        let memory = memory(&backing, image)?;
        let (begun, mut sum) = (Instant::now(), 0u64);
        for page in 0..size / PAGE_SIZE {
            let word: u64 = memory.read_obj(GuestAddress(page * PAGE_SIZE))?;
            sum = sum.wrapping_add(word);
        }
        let ours = speed(begun.elapsed());
        drop((memory, backing));
        let (elapsed, expected) = match bare {
            Some(bare) => bare,
            None => pread_loop(kind, size, image)?,
        };
        pairs.push((ours, speed(elapsed)));
        ensure!(sum == expected, "vm-memory read {sum:#x}, where the image holds {expected:#x}");
    }
    let name = format!("vm-memory, missing 4K pages, {kind}");
    let row = Row::of_pairs(PART, name, "pages/s", "bare pread loop", &pairs);
    Ok(row.target(Target::RatioAtLeast(0.85)))
}

/// Measures the same with only pread.
fn pread_loop(kind: BackingKind, size: u64, image: &Path) -> Result<(std::time::Duration, u64)> {
    let mapping = MemfdBacking::new(kind, size)?.map()?;
    let image = File::open(image)?;
    let (begun, mut sum) = (Instant::now(), 0u64);
    for page in 0..size / PAGE_SIZE {
        let at = mapping.at(page * PAGE_SIZE);
        let offset = (page * PAGE_SIZE) as libc::off64_t;
        // SAFETY: the page lies in the mapping, which no other code uses.
        let read = unsafe {
            libc::pread64(image.as_raw_fd(), at.as_ptr().cast(), PAGE_SIZE as usize, offset)
        };
        ensure!(read == PAGE_SIZE as isize, "read a page of the image: {read}");
        // SAFETY: as above; the start of a page is aligned.
        sum = sum.wrapping_add(unsafe { at.cast::<u64>().as_ptr().read_volatile() });
    }
    Ok((begun.elapsed(), sum))
}

/// Measures accesses to present pages, at random, in the same memory.
fn present(kind: BackingKind, size: u64, image: &Path) -> Result<Vec<Row>> {
    let backing = Arc::new(MemfdBacking::new(kind, size)?);
    let ours = memory(&backing, image)?;
    let mut all = vec![0; size as usize];
    ours.read_slice(&mut all, GuestAddress(0))?;
    let file = backing.file().context("the memory has a file")?.try_clone()?;
    let file = Some(FileOffset::new(file, 0));
    let plain: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size as usize, file)])?;
    let mut theirs = vec![0; size as usize];
    plain.read_slice(&mut theirs, GuestAddress(0))?;
    ensure!(all == theirs, "both look at the same memory");

    let mut state = 1u64;
    let addresses: Vec<GuestAddress> = (0..20_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (page, word) = ((state >> 20) % (size / PAGE_SIZE), state >> 55);
            GuestAddress(page * PAGE_SIZE + word * 8)
        })
        .collect();
    let mut page = vec![0u8; PAGE_SIZE as usize];
    let word = compare(
        &addresses,
        &mut page,
        |_, at| read_word(&ours, at),
        |_, at| read_word(&plain, at),
    )?;
    let addresses: Vec<_> =
        addresses.into_iter().map(|at| GuestAddress(at.0 & !(PAGE_SIZE - 1))).collect();
    let whole = compare(
        &addresses,
        &mut page,
        |page, at| Ok(ours.read_slice(black_box(page), at)?),
        |page, at| Ok(plain.read_slice(black_box(page), at)?),
    )?;
    let row = |what: &str, pairs: &[(f64, f64)]| {
        let name = format!("vm-memory, present, {what}, {kind}");
        let reference = "GuestMemoryMmap on the same memory";
        Row::of_pairs(PART, name, "ns/access", reference, pairs).target(Target::RatioAtMost(1.05))
    };
    Ok(vec![row("8 bytes", &word), row("4K", &whole)])
}

fn read_word<M: Bytes<GuestAddress>>(memory: &M, at: GuestAddress) -> Result<()>
where
    M::E: std::error::Error + Send + Sync + 'static,
{
    let word: u64 = memory.read_obj(at)?;
    black_box(word);
    Ok(())
}

/// Returns pairs of times, in nanoseconds per access, of both access methods, one right after the
/// other. Both read into the same buffer, because the time of a copy depends on its offset in a
/// page.
fn compare(
    addresses: &[GuestAddress],
    buffer: &mut [u8],
    mut ours: impl FnMut(&mut [u8], GuestAddress) -> Result<()>,
    mut theirs: impl FnMut(&mut [u8], GuestAddress) -> Result<()>,
) -> Result<Vec<(f64, f64)>> {
    type Access<'a> = &'a mut dyn FnMut(&mut [u8], GuestAddress) -> Result<()>;
    let mut pairs = Vec::new();
    let mut time = |batch: &[GuestAddress], access: Access<'_>| -> Result<f64> {
        let begun = Instant::now();
        for address in batch {
            access(buffer, *address)?;
        }
        Ok(begun.elapsed().as_nanos() as f64 / batch.len() as f64)
    };
    let batches: Vec<_> = addresses.chunks(BATCH).collect();
    for round in 0..PAIRED_ROUNDS {
        for at in 0..batches.len() {
            // Not the pages that the other method has just loaded into the caches.
            let other = (at + batches.len() / 2) % batches.len();
            // Each comes first equally often.
            pairs.push(if (round + at) % 2 == 0 {
                let first = time(batches[at], &mut ours)?;
                (first, time(batches[other], &mut theirs)?)
            } else {
                let first = time(batches[other], &mut theirs)?;
                (time(batches[at], &mut ours)?, first)
            });
        }
    }
    Ok(pairs)
}
