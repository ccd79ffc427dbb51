// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power cuts during a push: whatever part of its writes has reached the disk, a snapshot has the
//! right bytes or does not exist, and a repeated push completes it.
//!
//! The store is on a disk that records what the push, or the server in front of it, writes and
//! syncs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use demand_remote::Store;
use demand_remote::image::{Compression, GcOptions, ImageError, RemoteImage, gc, verify};
use demand_source::PageSource;
use test_support::power_cut::{Cut, RecordedDisk};

use crate::support::{PAGE, Place, Random, noise, objects, read};

const CHUNK: u32 = 16 << 10;
/// Those of the second push fill a pack of 512, and begin another one.
const CHUNKS: usize = 600;
const NOW: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

/// The kind of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    Directory,
    /// A server that syncs nothing.
    Server,
    /// A bucket, which a real object store loses no write of. Its writes are cut in their order.
    Bucket,
}

/// The folder of the store on the disk that is recorded.
const FAMILY: &str = "images/family";

/// Two snapshots: the second has been pushed onto the first, up to some write.
struct Family {
    old: Vec<u8>,
    new: Vec<u8>,
    /// All files after that.
    files: BTreeMap<PathBuf, Vec<u8>>,
    /// The objects of the second push, without its manifest.
    pushed: Vec<PathBuf>,
}

fn directory(path: &Path) -> Store {
    Store::directory(path).unwrap()
}

fn push(store: Store, family: &Family, name: &str) -> (u64, u64) {
    let (content, parent) = match name {
        "old" => (&family.old, None),
        _ => (&family.new, Some("old")),
    };
    let summary = Place::with(store).push(name, content, |push| {
        let push = push.chunk_size(CHUNK).compression(Compression::Lz4);
        if let Some(parent) = parent { push.parent(parent) } else { push }
    });
    let summary = summary.unwrap();
    (summary.written, summary.skipped)
}

/// Pushes both snapshots, and returns them with what power cuts leave of the second push.
fn record(disk: &RecordedDisk, medium: Medium, store: &Store) -> (Family, Vec<Cut>) {
    // A few bytes of each page, so that the packs are small.
    let mut random = Random::new(60);
    let mut old = vec![0; CHUNKS * CHUNK as usize];
    old.chunks_mut(PAGE).for_each(|page| noise(&mut page[..16], &mut random));
    let mut new = old.clone();
    for chunk in new.chunks_mut(CHUNK as usize).skip(CHUNKS / 8) {
        noise(&mut chunk[..16], &mut random);
    }
    let mut family = Family { old, new, files: BTreeMap::new(), pushed: Vec::new() };
    push(store.clone(), &family, "old");
    if medium != Medium::Directory {
        disk.settle();
    }
    let first = disk.writes();
    let before = disk.files().below(FAMILY);
    let (written, skipped) = push(store.clone(), &family, "new");
    family.files = disk.files().below(FAMILY);
    let new = family.files.keys().filter(|path| !before.contains_key(*path));
    family.pushed = new.filter(|path| !path.starts_with("snapshots")).cloned().collect();
    assert_eq!((written, skipped), (family.pushed.len() as u64 + 1, 1), "{:?}", family.pushed);
    if medium == Medium::Directory {
        // Whatever the push has confirmed stays.
        assert_eq!(disk.synced().below(FAMILY), family.files);
    }
    let (mut cuts, mut known) = (disk.cuts(first), BTreeSet::new());
    cuts.retain(|cut| {
        (medium != Medium::Bucket || cut.in_order) && known.insert(cut.files.below(FAMILY))
    });
    (family, cuts)
}

/// Returns whether a snapshot can be read, or checks that one line says why it cannot.
fn is_readable(store: &Store, name: &str, content: &[u8], what: &str) -> bool {
    // The server of buckets is slow.
    let step = if store.name().starts_with("s3:") { 499 } else { 31 } * PAGE;
    let failure = match RemoteImage::open(store, name) {
        Ok(image) => {
            let pages = (0..content.len()).step_by(step).map(|at| (at, read(&image, at, PAGE)));
            let mut failure = None;
            for (at, bytes) in pages {
                match bytes {
                    Ok(bytes) => assert!(bytes == content[at..][..PAGE], "{what}: {name} at {at}"),
                    Err(error) => failure = Some(error.to_string()),
                }
            }
            assert_eq!(image.size(), content.len() as u64);
            failure
        }
        Err(ImageError::NoSnapshot { .. }) => return false,
        Err(error) => Some(error.to_string()),
    };
    if let Some(failure) = &failure {
        assert!(failure.starts_with("cannot ") && !failure.contains('\n'), "{what}: {failure}");
    }
    failure.is_none()
}

/// Removes garbage. What a server has written in part to the folder of snapshots is an unreadable
/// snapshot, with which nothing is removed.
fn collect(medium: Medium, folder: &Path, store: &Store, what: &str) {
    // Web servers list nothing.
    let local = directory(folder);
    let removed = gc(if medium == Medium::Server { &local } else { store }, NOW);
    assert!(removed.is_ok() || medium == Medium::Server, "{what}: {removed:?}");
}

/// Checks a store after a power cut: before and after a repeated push, and the removal of garbage.
/// Returns whether the second snapshot was readable at once.
fn check(
    medium: Medium,
    number: usize,
    cut: &Cut,
    family: &Family,
    folder: &Path,
    store: &Store,
) -> bool {
    let what = &*cut.what;
    assert!(is_readable(store, "old", &family.old, what), "{what}");
    let manifest = folder.join("snapshots/new").exists();
    let readable = is_readable(store, "new", &family.new, what);
    if medium != Medium::Server || cut.in_order {
        assert_eq!(readable, manifest, "{what}");
    }
    if number.is_multiple_of(2) {
        collect(medium, folder, store, what);
        assert!(is_readable(store, "old", &family.old, what), "{what}");
        assert_eq!(is_readable(store, "new", &family.new, what), readable, "{what}");
    }
    let is_whole = |path: &&PathBuf| {
        fs::read(folder.join(path)).is_ok_and(|content| content == family.files[*path])
    };
    let whole = family.pushed.iter().filter(is_whole).count() as u64;
    let all = family.pushed.len() as u64 + 2;
    // The side file is that of the first snapshot.
    assert_eq!(push(store.clone(), family, "new"), (all - whole - 1, whole + 1), "{what}");
    collect(medium, folder, store, what);
    if medium == Medium::Directory {
        // Neither drafts nor orphans are left.
        let all = objects(folder);
        let paths = all.iter().map(|path| path.strip_prefix(folder).unwrap());
        let right = family.files.keys().map(PathBuf::as_path);
        assert_eq!(paths.collect::<BTreeSet<_>>(), right.collect(), "{what}");
    }
    for (name, content) in [("old", &family.old), ("new", &family.new)] {
        // Web servers and buckets have the same objects in their folders.
        verify(&directory(folder), name, &mut |_| true)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(is_readable(store, name, content, what), "{what}");
    }
    readable
}

/// Checks what each cut leaves, in a folder of `root` that `open` opens by its name.
fn check_all(
    medium: Medium,
    (family, cuts): (Family, Vec<Cut>),
    root: &Path,
    open: &dyn Fn(&str) -> Store,
) {
    let begun = Instant::now();
    let states = cuts.iter().enumerate();
    let readable = states.filter(|(number, cut)| {
        let name = format!("cut{number}");
        let folder = root.join(&name);
        cut.files.write(Path::new(FAMILY), &folder);
        check(medium, *number, cut, &family, &folder, &open(&name))
    });
    let readable = readable.count();
    let all = cuts.len();
    println!("{medium:?}: {all} states, {readable} with the snapshot, {:?}", begun.elapsed());
    assert!(all >= 5 && (1..all).contains(&readable));
}

#[test]
fn push_to_directory_survives_any_cut() {
    let Some(disk) = RecordedDisk::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let recorded = record(&disk, Medium::Directory, &directory(&disk.path().join(FAMILY)));
    let open = |name: &str| directory(&folder.path().join(name));
    check_all(Medium::Directory, recorded, folder.path(), &open);
}

#[cfg(feature = "http")]
#[test]
fn push_to_web_server_survives_any_cut() {
    use test_support::servers::Web;

    let Some(disk) = RecordedDisk::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let settings = "dav_methods PUT; create_full_put_path on; client_max_body_size 64m; \
                    log_not_found off;";
    let Some(web) = Web::start(disk.path(), settings) else { return };
    let recorded =
        record(&disk, Medium::Server, &Store::open(&web.url(FAMILY).parse().unwrap()).unwrap());
    let Some(web) = Web::start(folder.path(), settings) else { return };
    let open = |name: &str| Store::open(&web.url(name).parse().unwrap()).unwrap();
    check_all(Medium::Server, recorded, folder.path(), &open);
}

#[cfg(feature = "s3")]
#[test]
fn push_to_bucket_survives_any_cut() {
    use test_support::child::is_child;
    use test_support::servers::{S3, free_port};

    if !is_child() {
        return S3::run_client("power_cut::push_to_bucket_survives_any_cut", free_port());
    }
    let port = S3::port_of_variables();
    let open = |name: &str| Store::open(&format!("s3://images/{name}").parse().unwrap()).unwrap();
    let Some(disk) = RecordedDisk::new() else { return };
    fs::create_dir(disk.path().join("images")).unwrap();
    let recorded = {
        let Some(_server) = S3::start_at(disk.path(), port) else { return };
        record(&disk, Medium::Bucket, &open("family"))
    };
    let folder = tempfile::tempdir().unwrap();
    let bucket = folder.path().join("images");
    fs::create_dir(&bucket).unwrap();
    let Some(_server) = S3::start_at(folder.path(), port) else { return };
    check_all(Medium::Bucket, recorded, &bucket, &open);
}
