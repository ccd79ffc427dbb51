// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots on a full disk, and at a mount point.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::thread;

use demand_vmm::snapshot::dir::PartialSnapshot;
use demand_vmm::snapshot::open::read_state;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::UnshareFlags;

/// Runs `work` with a disk of 1 MiB at `folder` that only its thread sees. `None` without root.
fn on_small_disk(folder: &Path, work: impl FnOnce() + Send) -> Option<()> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the call separates only this thread's working directory and mounts from the
            // process's. The thread ends together with them, and no other code relies on sharing
            // them.
            let parted =
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) };
            parted.ok()?;
            let apart = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", apart).ok()?;
            mount("none", folder, "tmpfs", MountFlags::empty(), c"size=1m").ok()?;
            work();
            Some(())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn names(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_full_disk_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let done = on_small_disk(folder.path(), || {
        let dir = folder.path().join("snapshot");
        // The image itself does not fit.
        let partial = PartialSnapshot::create(&dir).unwrap();
        let error = File::create(partial.memory()).unwrap().write_all(&[1; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        drop(partial);
        assert_eq!(names(folder.path()), 0);
        // The state, which is written last, does not fit.
        let partial = PartialSnapshot::create(&dir).unwrap();
        fs::write(partial.memory(), [1; 512 << 10]).unwrap();
        fs::write(partial.hashes(), [1; 1024]).unwrap();
        let error = partial.publish(&"x".repeat(768 << 10)).unwrap_err().to_string();
        assert!(error.contains("state: No space left on device"), "{error}");
        assert!(error.contains("free some space"), "{error}");
        assert_eq!(names(folder.path()), 0);
        // A snapshot that fits is written.
        let partial = PartialSnapshot::create(&dir).unwrap();
        fs::write(partial.memory(), [1; 512 << 10]).unwrap();
        fs::write(partial.hashes(), [1; 1024]).unwrap();
        partial.publish(&"x").unwrap();
        assert_eq!(read_state::<String>(&dir).unwrap(), "x");
    });
    if done.is_none() {
        test_support::host::skip("a disk of its own needs root");
    }
}

#[test]
fn a_mount_point_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let done = on_small_disk(folder.path(), || {
        let at = |name: &str| folder.path().join(name);
        let make = |name: &str| fs::create_dir(at(name)).map(|()| at(name)).unwrap();
        let remedy = "it is a mount point, which cannot be replaced; name a directory in it";
        let (disk, bound, late, other) = (make("disk"), make("bound"), make("late"), make("other"));
        mount("none", &disk, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
        // A bind mount from the same disk.
        mount_bind(&other, &bound).unwrap();
        for dir in [&disk, &bound] {
            let error = PartialSnapshot::create(dir).unwrap_err().to_string();
            assert!(error.contains(remedy), "{error}");
        }
        // Nothing has been written, and a directory inside the mount is accepted.
        assert_eq!(names(folder.path()), 4);
        drop(PartialSnapshot::create(&disk.join("snapshot")).unwrap());
        // A mount that is made after `create` is found only at the end.
        let partial = PartialSnapshot::create(&late).unwrap();
        fs::write(partial.memory(), [1; 4096]).unwrap();
        fs::write(partial.hashes(), [1; 8]).unwrap();
        mount_bind(&other, &late).unwrap();
        let error = partial.publish(&"x").unwrap_err().to_string();
        assert!(error.contains(&format!("rename: {remedy}")), "{error}");
        assert_eq!((names(folder.path()), names(&other)), (4, 0));
    });
    if done.is_none() {
        test_support::host::skip("a disk of its own needs root");
    }
}
