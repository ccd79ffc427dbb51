// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores in one process, one after the other, leave nothing behind: each opens a pushed snapshot
//! on a web server through the host cache, replays its working set, is read, and is dropped, every
//! second time while pages are missing. `RESTORES` gives their number (`rust-vmm-ci/soak
//! --sources`).

use std::fs;
use std::path::Path;
use std::sync::Arc;

use demand_kvm::open_kvm;
use demand_memory::{FillOptions, FillOrder, FillRange, PAGE_SIZE, PageRange};
use demand_paging::LazyBuilder;
use demand_remote::image::{Push, RemoteImage, RemoteOptions};
use demand_remote::working_set::{
    ImageId, Recording, ReplayedSource, WorkingSet, beside_image, record,
};
use demand_remote::{HostCache, Location, Store};
use demand_source::{LocalFile, PageSource};
use demand_tests::cannot_run;
use demand_tests::host::skip;
use demand_tests::tiny_snapshot::TinySnapshot;
use test_support::servers::Web;
use test_support::wait::until;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// Number of restores, unless the environment says otherwise.
const RESTORES: usize = 24;
/// Number of those after which nothing more is allocated once for all.
const WARM: usize = 8;

/// The resources of this process.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Resident memory, in bytes.
    resident: u64,
}

impl Held {
    fn now() -> Held {
        let count = |folder: &str| fs::read_dir(folder).unwrap().count();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        Held {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            mappings: fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
            resident: kib << 10,
        }
    }
}

/// A pushed snapshot, and what restores of it share.
struct Pushed {
    folder: tempfile::TempDir,
    content: Vec<u8>,
    url: Location,
}

impl Pushed {
    fn new(folder: tempfile::TempDir, web: &Web) -> Pushed {
        let content = TinySnapshot::content(usize::try_from(SIZE).unwrap());
        let file = folder.path().join("memory");
        fs::write(&file, &content).unwrap();
        let image = LocalFile::open(&file).unwrap();
        let store = Store::directory(folder.path().join("store")).unwrap();
        Push::new(&image, [7; 16]).run(&store, "vm", &mut |_| true).unwrap();
        let url = web.url("store").parse().unwrap();
        let pushed = Pushed { folder, content, url };

        let touched: Vec<u64> = (0..64).map(|step| step * 37 % (SIZE / PAGE_SIZE)).collect();
        let opened = pushed.open();
        let id = id_of(&opened);
        let recording = Recording { image: id, source: &image, touched: &touched, before: None };
        let at = beside_image(&pushed.url, opened.manifest().index.sha256);
        let at = Location::Path(pushed.path().join("store/ws").join(at.split().unwrap().1));
        record(&at, recording, &|| true).unwrap();
        pushed
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn open(&self) -> RemoteImage {
        let cache = HostCache::open(self.path().join("cache"), 64 * MIB).unwrap();
        let store = Store::open(&self.url).unwrap();
        RemoteImage::open_cached(&store, "vm", RemoteOptions::default(), cache).unwrap()
    }

    /// Restores, reads some pages, and drops everything. If it is to be `whole`, all of the memory
    /// arrives before.
    fn restore(&self, whole: bool) {
        let image = self.open();
        let at = beside_image(&self.url, image.manifest().index.sha256);
        let set = WorkingSet::open(&at, id_of(&image)).unwrap();
        let set_pages = set.ranges().map(|range| FillRange {
            region: 0,
            pages: PageRange::new(range.start, range.end - range.start),
        });
        let ranges: Vec<_> = set_pages.collect();
        let order = match whole {
            true => FillOrder::RangesFirst(ranges),
            false => FillOrder::RangesOnly(ranges),
        };
        let source: Arc<dyn PageSource> = Arc::new(ReplayedSource::new(Arc::new(image), set));
        let lazy = LazyBuilder::new(source)
            .region(GuestAddress(0), SIZE)
            .fill(FillOptions { order, ..FillOptions::default() })
            .build()
            .unwrap();
        let fd = lazy.create_vm(&open_kvm().unwrap()).unwrap();
        let vm = lazy.attach(fd).unwrap();
        for page in [0, 1, 700, 701, SIZE / PAGE_SIZE - 1] {
            let mut bytes = vec![0; 4096];
            vm.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
            let at = usize::try_from(page * PAGE_SIZE).unwrap();
            assert!(bytes == self.content[at..at + 4096], "page {page}");
        }
        if whole {
            until("all memory is present", || vm.is_finished());
        }
    }
}

fn id_of(image: &RemoteImage) -> ImageId {
    ImageId::of_index(image.manifest().index.sha256, image.size())
}

#[test]
fn restores_of_one_process_leave_nothing() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(web) = Web::start(folder.path(), "") else { return };
    let pushed = Pushed::new(folder, &web);
    let restores = std::env::var("RESTORES").map_or(RESTORES, |number| number.parse().unwrap());
    (0..WARM).for_each(|round| pushed.restore(round % 2 == 0));
    let before = Held::now();
    (0..restores).for_each(|round| pushed.restore(round % 2 == 0));
    // Threads that close what was tried end a little later. Idle connections to the server are kept
    // for the next restore, fewer than there are restores.
    until("descriptors, threads and mappings are as before", || {
        let now = Held::now();
        now.descriptors <= before.descriptors + 16
            && now.threads <= before.threads
            && now.mappings <= before.mappings + 16
    });
    let after = Held::now();
    println!("after {WARM} restores: {before:?}; after {restores} more: {after:?}");
    // Less than a page for each restore of 2,048 pages: what malloc keeps varies.
    assert!(after.resident < before.resident + 4 * MIB, "{before:?}, {after:?}");
}
