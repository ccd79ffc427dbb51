// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm image`: snapshots in stores.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use demand_remote::image::{
    self, Compression, DEFAULT_CHUNK_SIZE, GcOptions, Info, Push, PushProgress, RemoteImage,
};
use demand_remote::{Location, Store};
use demand_source::PageSource;
use serde_json::json;

use crate::cli::error::CliError;
use crate::cli::output::{print, to_json};
use crate::cli::parse::parse_number;
use crate::config::size::parse_size;
use crate::error::Error;
use crate::report::progress::Progress;
use crate::report::size;
use crate::snapshot::open::OpenSnapshot;

#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes a snapshot to a store, compressed. A push that was interrupted continues where it was.
    Push(PushArgs),
    /// Copies a snapshot from a store to a directory.
    Pull(PullArgs),
    /// Tells the sizes of a snapshot in a store.
    Info(InfoArgs),
    /// Reads a whole snapshot in a store, and checks every byte.
    Verify(PlaceArgs),
    /// Removes what no snapshot of a store uses.
    Gc(GcArgs),
}

#[derive(Debug, Args)]
struct PushArgs {
    /// Directory of the snapshot.
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
    /// A snapshot in the same store of which most is the same. What is, is not stored again.
    #[arg(long, value_name = "NAME")]
    parent: Option<String>,
    /// How chunks are compressed: none, lz4 or zstd:LEVEL.
    #[arg(long, default_value_t = Compression::default())]
    compress: Compression,
    /// Size of a chunk, which one access fetches: a power of two from 16K to 1M.
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_CHUNK_SIZE, value_parser = parse_chunk)]
    chunk: u32,
}

#[derive(Debug, Args)]
struct PlaceArgs {
    /// The store, a slash, and the snapshot's name there: s3://BUCKET/PREFIX/NAME, DIR/NAME, or for
    /// reading https://HOST/PATH/NAME.
    #[arg(value_name = "STORE/NAME")]
    place: String,
}

#[derive(Debug, Args)]
struct PullArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The directory that becomes the snapshot.
    #[arg(value_name = "DIR")]
    destination: PathBuf,
}

#[derive(Debug, Args)]
struct InfoArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct GcArgs {
    /// The store: s3://BUCKET/PREFIX or DIR.
    #[arg(value_name = "STORE")]
    store: String,
    /// Keep what is younger, in hours: longer than any push takes.
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = parse_number::<u64>)]
    grace: u64,
    /// Remove nothing, and tell what would be.
    #[arg(long)]
    dry_run: bool,
}

fn parse_chunk(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    u32::try_from(bytes).map_err(|_| format!("{text} is more than 1M"))
}

fn location(text: &str) -> Result<Location, Error> {
    text.parse().map_err(|error: demand_remote::LocationError| {
        CliError::Usage { error: error.to_string() }.into()
    })
}

impl PlaceArgs {
    /// Opens the store, and returns the name of the snapshot.
    fn open(&self) -> Result<(Store, String), Error> {
        let Some((folder, name)) = location(&self.place)?.split() else {
            let error = format!(
                "cannot use {}: it names no snapshot; add a slash and its name",
                self.place
            );
            return Err(CliError::Usage { error }.into());
        };
        Ok((Store::open(&folder)?, name))
    }
}

pub(crate) fn image_command(args: ImageArgs) -> Result<(), Error> {
    match args.command {
        Command::Push(args) => push(&args),
        Command::Pull(args) => pull(&args),
        Command::Info(args) => info(&args),
        Command::Verify(args) => verify(&args),
        Command::Gc(args) => gc(&args),
    }
}

fn push(args: &PushArgs) -> Result<(), Error> {
    let (store, name) = args.place.open()?;
    // Its files are open: a name that is replaced by a link meanwhile adds no other file.
    let snapshot = OpenSnapshot::open(&args.snapshot)?;
    let image = snapshot.local_memory()?;
    let beside = snapshot.local_files()?;
    let mut push =
        Push::new(&image, image.generation()).chunk_size(args.chunk).compression(args.compress);
    for (name, file) in &beside {
        push = push.file(*name, format!("/proc/self/fd/{}", file.as_raw_fd()));
    }
    if let Some(parent) = &args.parent {
        push = push.parent(parent);
    }
    let mut shown = Progress::new("push", "bytes done", PageSource::size(&image));
    let summary = push.run(&store, &name, &mut |progress: PushProgress| {
        shown.set(progress.done);
        true
    })?;
    drop(shown);
    print(&format!(
        "pushed {name}: {} of chunks in {} packs, {} of {} chunks taken from the parent, {} objects \
         written, {} already there\n",
        size(summary.pack_bytes),
        summary.packs,
        summary.chunks.reused,
        summary.chunks.stored,
        summary.written,
        summary.skipped
    ))
}

fn pull(args: &PullArgs) -> Result<(), Error> {
    let (store, name) = args.place.open()?;
    let total = RemoteImage::open(&store, &name)?.size();
    let mut shown = Progress::new("pull", "bytes written", total);
    let summary = image::pull(&store, &name, &args.destination, &mut |done| {
        shown.set(done);
        true
    })?;
    drop(shown);
    print(&format!("pulled {name}: {} of data\n", size(summary.bytes_written)))
}

fn info(args: &InfoArgs) -> Result<(), Error> {
    let (store, name) = args.place.open()?;
    let Info { manifest, chunks, zero, stored_bytes, shared, packs, pack_bytes } =
        image::info(&store, &name)?;
    if args.json {
        let value = json!({
            "manifest": manifest, "chunks": chunks, "zero": zero, "stored_bytes": stored_bytes,
            "shared": shared, "packs": packs, "pack_bytes": pack_bytes,
        });
        return print(&(to_json(&value)? + "\n"));
    }
    let parent = match (&manifest.parent, shared) {
        (None, _) => "none".into(),
        (Some(parent), None) => format!("{parent}, which the store does not have any more"),
        (Some(parent), Some(shared)) => format!("{parent}, {shared} chunks shared"),
    };
    print(&format!(
        "memory  {} in {chunks} chunks of {}, {zero} of them zero\n\
         stored  {}, in {packs} packs of {} in all\n\
         parent  {parent}\n\
         files   {}\n",
        size(manifest.image.size),
        size(manifest.image.chunk_size.into()),
        size(stored_bytes),
        size(pack_bytes),
        manifest.files.iter().map(|file| &*file.name).collect::<Vec<_>>().join(", "),
    ))
}

fn verify(args: &PlaceArgs) -> Result<(), Error> {
    let (store, name) = args.open()?;
    let total = RemoteImage::open(&store, &name)?.size();
    let mut shown = Progress::new("verify", "bytes checked", total);
    let summary = image::verify(&store, &name, &mut |done| {
        shown.set(done);
        true
    })?;
    drop(shown);
    print(&format!(
        "{name} is whole: {} chunks, {} packs, {} files\n",
        summary.chunks, summary.packs, summary.files
    ))
}

fn gc(args: &GcArgs) -> Result<(), Error> {
    let store = Store::open(&location(&args.store)?)?;
    let grace = Duration::from_secs(args.grace.saturating_mul(3600));
    let garbage = image::gc(&store, GcOptions { grace, dry_run: args.dry_run })?;
    let bytes = garbage.removed.iter().map(|object| object.len).sum();
    let verb = if args.dry_run { "would remove" } else { "removed" };
    print(&format!(
        "{verb} {} objects of {}; {} snapshots use {} others, and {} are too young\n",
        garbage.removed.len(),
        size(bytes),
        garbage.snapshots,
        garbage.live,
        garbage.young
    ))
}
