// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command lines of the examples, and what they print.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bare_guest::summing;
use clap::{Args, Parser};
use demand_kvm::EngineChoice;
use demand_memory::{BackingKind, FaultPath, Stats};

use crate::Result;

/// Maximum memory in MiB that the guest can use: many machines have devices above.
const MOST: u64 = 2048;

/// How memory is kept, and how accesses to it are trapped.
#[derive(Args, Debug)]
pub struct MemoryOptions {
    /// auto, kvm-userfault, uffd, uffd-poison or kvm-attributes
    #[arg(long, default_value_t)]
    pub engine: EngineChoice,
    /// shmem, hugetlb-2m, hugetlb-1g or guest-memfd
    #[arg(long, default_value_t = BackingKind::Shmem)]
    pub backing: BackingKind,
}

/// The image that memory is fetched from.
#[derive(Args, Debug)]
pub struct ImageOptions {
    /// An image of memory kept by an earlier run; without it, a small one is created
    #[arg(long)]
    image: Option<PathBuf>,
    /// MiB of memory of the created image
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=MOST))]
    mib: u64,
    /// Keep the created image at this path
    #[arg(long, conflicts_with = "image")]
    keep: Option<PathBuf>,
}

impl ImageOptions {
    /// Returns the path of the image, which is created in `scratch` unless the options name one.
    ///
    /// # Errors
    ///
    /// Fails if the image cannot be written, or has more memory than the guest can use.
    pub fn path(&self, scratch: &Path) -> Result<PathBuf> {
        if let Some(image) = &self.image {
            // An image that cannot be read is refused when it is opened.
            if std::fs::metadata(image).is_ok_and(|image| image.len() > MOST << 20) {
                let most = format!("the guest has no use for more than {MOST} MiB");
                return Err(
                    format!("cannot run {}: {most}; use a smaller image", image.display()).into()
                );
            }
            return Ok(image.clone());
        }
        let made = self.keep.clone().unwrap_or_else(|| scratch.join("memory.img"));
        summing::write_walker(&made, self.mib << 20).map_err(|error| {
            format!("cannot write image {}: {error}; free space there", made.display())
        })?;
        Ok(made)
    }
}

/// Runs an example with its options, and prints its error as one line.
pub fn run<O: Parser>(program: &str, example: impl FnOnce(&O) -> Result<()>) -> ExitCode {
    match example(&O::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the numbers of pages and faults of each path, as text.
pub fn arrived(stats: &Stats) -> String {
    let path = |path: FaultPath| {
        let report = stats.path(path);
        format!("{} {} pages in {} faults", path.name(), report.pages, report.faults)
    };
    FaultPath::ALL.map(path).join(", ")
}
