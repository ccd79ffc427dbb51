// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::Duration;

#[test]
fn exactly_all_pages_are_missing_at_first() {
    let bitmap = MissingBitmap::new(130).unwrap();
    assert_eq!(bitmap.count_missing(PageRange::new(0, 130)), 130);
    assert_eq!(bitmap.words().load(2), 3);
    for pages in [1, 7, 8, 9, 64, 1 << 17, (1 << 20) + 13] {
        let bitmap = MissingBitmap::new(pages).unwrap();
        assert_eq!(bitmap.count_missing(PageRange::new(0, pages)), pages);
        let beyond: u32 =
            (0..bitmap.words().len()).map(|word| bitmap.words().load(word).count_ones()).sum();
        assert_eq!(u64::from(beyond), pages, "no bit behind the last page");
    }
    assert!(MissingBitmap::new(0).is_err());
    assert!(MissingBitmap::all_present(u64::MAX).is_err());
}

#[test]
fn initially_present_bitmap_is_complete_and_costs_nothing() {
    use std::os::unix::fs::MetadataExt;
    // The bitmap of 1 TiB of memory.
    let bitmap = MissingBitmap::all_present(1 << 28).unwrap();
    assert!(bitmap.is_complete() && !bitmap.is_missing((1 << 28) - 1));
    assert!(bitmap.claim(PageRange::new(1 << 20, 5000)).is_empty());
    let metadata = bitmap.words().file().metadata().unwrap();
    assert_eq!(metadata.len(), 1 << 25);
    assert!(metadata.blocks() * 512 < 1 << 16, "{} blocks", metadata.blocks());
    assert!(MissingBitmap::all_present(0).is_err());
}

#[test]
fn holders_of_the_file_can_only_read() {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    // Large enough that the bitmap's own mapping has not yet touched all of its pages.
    let bitmap = MissingBitmap::new(1 << 20).unwrap();
    let file = bitmap.words().file().clone();
    let refused = |error: io::Error| {
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    };
    refused(file.write_all_at(&[0; 8], 0).unwrap_err());
    refused(file.set_len(0).unwrap_err());
    refused(file.set_len(1 << 20).unwrap_err());
    refused(crate::Mapping::shared(&file, 1 << 17).unwrap_err());
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes no pointer, and all accesses to the file's content are atomic.
    let punched = unsafe { libc::fallocate(file.as_raw_fd(), punch, 0, 4096) };
    assert_eq!(punched, -1, "a hole would make pages present");
    refused(io::Error::last_os_error());
    // The bitmap itself can still write.
    for page in [0, (1 << 20) - 1] {
        assert!(bitmap.claim_page(page));
        bitmap.mark_populated(PageRange::page(page));
        bitmap.publish(PageRange::page(page));
    }
    let mut word = [0; 8];
    file.read_exact_at(&mut word, (1 << 17) - 8).unwrap();
    assert_eq!(u64::from_le_bytes(word), u64::MAX >> 1);
}

#[test]
fn claim_spans_words_and_skips_claimed_pages() {
    let bitmap = MissingBitmap::new(512).unwrap();
    assert_eq!(bitmap.claim(PageRange::new(100, 2))[..], [PageRange::new(100, 2)]);
    let runs = bitmap.claim(PageRange::new(0, 512));
    assert_eq!(runs[..], [PageRange::new(0, 100), PageRange::new(102, 410)]);
    assert!(bitmap.claim(PageRange::new(0, 512)).is_empty());
}

#[test]
fn a_single_page_is_claimed_like_a_run() {
    let bitmap = MissingBitmap::new(70).unwrap();
    assert!(bitmap.claim_page(64));
    assert!(!bitmap.claim_page(64), "it is claimed");
    let runs = bitmap.claim(PageRange::new(63, 3));
    assert_eq!(runs[..], [PageRange::page(63), PageRange::page(65)]);
    assert!(!bitmap.claim_page(63), "it was claimed with a run");
    bitmap.publish(PageRange::page(64));
    assert!(!bitmap.claim_page(64), "it is present");
    assert!(bitmap.is_missing(63) && !bitmap.is_missing(64) && bitmap.is_missing(65));
}

#[test]
fn sweep_leaves_claimed_units_alone() {
    let bitmap = MissingBitmap::new(512).unwrap();
    bitmap.claim(PageRange::page(70));
    bitmap.claim(PageRange::new(128, 64));
    bitmap.publish(PageRange::new(128, 64));
    let mut removed = Vec::new();
    let others = bitmap.sweep(PageRange::new(0, 512), 64, |run| {
        removed.push(run);
        Ok::<_, ()>(())
    });
    assert_eq!(others, Ok(vec![PageRange::new(64, 64)]));
    assert_eq!(removed, [PageRange::new(0, 64), PageRange::new(192, 320)]);
    assert_eq!(bitmap.sweep(PageRange::new(192, 64), 64, |_| Err("full")), Err("full"));
    // In units of one page.
    removed.clear();
    let others = bitmap.sweep(PageRange::new(64, 65), 1, |run| {
        removed.push(run);
        Ok::<_, ()>(())
    });
    assert_eq!(others, Ok(vec![PageRange::page(70)]));
    assert_eq!(removed, [PageRange::new(64, 6), PageRange::new(71, 57)]);
}

#[test]
fn present_pages_are_not_claimed_again() {
    let bitmap = MissingBitmap::new(64).unwrap();
    bitmap.claim(PageRange::page(63));
    bitmap.publish(PageRange::page(63));
    assert_eq!(bitmap.claim(PageRange::new(0, 64))[..], [PageRange::new(0, 63)]);
}

#[test]
fn last_page_is_reported_once() {
    let bitmap = MissingBitmap::new(5000).unwrap();
    let last = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for page in 0..5000 {
                    for run in bitmap.claim(PageRange::page(page)) {
                        if bitmap.publish(run) == Published::Last {
                            last.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert!(bitmap.is_complete());
    assert_eq!(last.into_inner(), 1);
    assert_eq!(bitmap.first_missing(PageRange::new(0, 5000)), None);
}

#[test]
fn waiter_resumes_once_its_range_is_present() {
    let bitmap = MissingBitmap::new(512).unwrap();
    let waiter = Waiter::new();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| bitmap.wait(PageRange::new(0, 512), &waiter));
        for run in bitmap.claim(PageRange::new(0, 512)) {
            for page in (run.first..run.end()).rev() {
                bitmap.publish(PageRange::page(page));
            }
        }
        assert_eq!(waiting.join().unwrap(), Wait::Present);
    });
}

#[test]
fn a_waiter_can_be_kicked_and_waits_again() {
    let bitmap = MissingBitmap::new(64).unwrap();
    bitmap.claim(PageRange::page(1));
    let waiter = Waiter::new();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
        thread::sleep(Duration::from_millis(20));
        waiter.kick();
        assert_eq!(waiting.join().unwrap(), Wait::Kicked);
        waiter.clear_kick();
        let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
        bitmap.publish(PageRange::page(1));
        assert_eq!(waiting.join().unwrap(), Wait::Present);
    });
}

#[test]
fn shared_waiter_wakes_each_thread() {
    let bitmap = std::sync::Arc::new(MissingBitmap::new(64).unwrap());
    bitmap.claim(PageRange::new(3, 2));
    let waiter = Waiter::new();
    let waits = [3, 4].map(|page| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (bitmap, waiter) = (bitmap.clone(), waiter.clone());
        thread::spawn(move || sender.send(bitmap.wait(PageRange::page(page), &waiter)));
        (page, receiver)
    });
    for (page, _) in &waits {
        while !bitmap.is_wanted(PageRange::page(*page)) {
            thread::yield_now();
        }
    }
    for (page, receiver) in waits {
        bitmap.publish(PageRange::page(page));
        let outcome = receiver.recv_timeout(Duration::from_secs(20));
        assert_eq!(outcome, Ok(Wait::Present), "the wait for page {page}");
    }
}

#[test]
fn stopping_ends_all_waits_and_drops_callbacks() {
    let bitmap = MissingBitmap::new(64).unwrap();
    let waiter = Waiter::new();
    let kept = std::sync::Arc::new(());
    let in_callback = kept.clone();
    bitmap.when_present(PageRange::page(0), move || panic!("{in_callback:?} never came"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
        thread::sleep(Duration::from_millis(20));
        bitmap.stop();
        assert_eq!(waiting.join().unwrap(), Wait::Stopped);
    });
    assert_eq!(bitmap.wait(PageRange::page(1), &waiter), Wait::Stopped);
    assert_eq!(std::sync::Arc::strong_count(&kept), 1);
}

#[test]
fn a_callback_runs_when_its_unit_is_whole() {
    let bitmap = MissingBitmap::new(1024).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    bitmap.when_present(PageRange::new(512, 512), move || sender.send(()).unwrap());
    bitmap.claim(PageRange::new(0, 1024));
    for page in (512..1024).rev() {
        assert!(receiver.try_recv().is_err());
        bitmap.publish(PageRange::page(page));
    }
    receiver.try_recv().unwrap();
}
