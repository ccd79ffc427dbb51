// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares image files of random shapes with a model of their bytes.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::os::unix::fs::FileExt;

use demand_source::{Destination, Extent, LocalFile, PageSource, SourceError};
use proptest::prelude::*;

const MOST: u64 = 100_000;

/// Generates an image's length and the runs of bytes written to it.
fn image() -> impl Strategy<Value = (u64, Vec<(u64, u64, u8)>)> {
    (1..MOST).prop_flat_map(|len| {
        let run = (0..len, 1..20_000u64, 1..=255u8)
            .prop_map(move |(start, count, byte)| (start, count.min(len - start), byte));
        (Just(len), prop::collection::vec(run, 0..6))
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn image_reads_as_written(
        (len, writes) in image(),
        reads in prop::collection::vec((0..MOST, 0..20_000u64), 0..20),
        wild in (any::<u64>(), 0..100u64),
        shrunk: prop::sample::Index,
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut model = vec![0; len as usize];
        file.as_file().set_len(len).unwrap();
        for (start, count, byte) in writes {
            model[start as usize..][..count as usize].fill(byte);
            file.as_file().write_all_at(&vec![byte; count as usize], start).unwrap();
        }
        let source = LocalFile::open(file.path()).unwrap();
        prop_assert_eq!(source.size(), len);

        // The extents cover the image, and holes are all zeros.
        let mut at = 0;
        while at < len {
            let extent = source.extent(at).unwrap();
            prop_assert!(at < extent.end() && extent.end() <= len, "{extent:?} at {at}");
            if extent.is_hole() {
                let hole = &model[at as usize..extent.end() as usize];
                prop_assert!(hole.iter().all(|byte| *byte == 0), "{extent:?} at {at}");
            }
            // A query in the middle of an extent returns the same extent.
            let middle = at + (extent.end() - at) / 2;
            prop_assert_eq!(source.extent(middle).unwrap(), extent);
            at = extent.end();
        }
        prop_assert!(source.extent(len).is_err());
        // Queries in descending order never return a hole where there is data.
        for at in (0..len).rev().step_by(997) {
            let extent = source.extent(at).unwrap();
            prop_assert!(at < extent.end() && extent.end() <= len);
            prop_assert!(!extent.is_hole() || model[at as usize] == 0, "{extent:?} at {at}");
        }

        for (at, count) in reads.into_iter().chain([(0, len), (len, 0), wild]) {
            let mut bytes = vec![0xee; count as usize];
            let read = source.read_through(at, &mut Destination::from(&mut bytes[..]));
            if at.checked_add(count).is_some_and(|end| end <= len) {
                read.unwrap();
                prop_assert!(bytes == model[at as usize..][..count as usize], "{count} at {at}");
            } else {
                let refused = matches!(read, Err(SourceError::OutOfRange { .. }));
                prop_assert!(refused, "{count} bytes at {at}");
            }
        }

        // A shrunk file: bytes behind its new end are never delivered, neither as zeros nor
        // otherwise.
        let end = shrunk.index(len as usize) as u64;
        file.as_file().set_len(end).unwrap();
        let mut bytes = vec![0xee; (len - end) as usize];
        let read = source.read_through(end, &mut Destination::from(&mut bytes[..]));
        let refused = matches!(read, Err(SourceError::Shrunk { .. }));
        prop_assert!(refused, "read {read:?}");
        // A new thread remembers no extents.
        let asked = || source.extent(end);
        let fresh = std::thread::scope(|scope| scope.spawn(asked).join().unwrap());
        let refused = matches!(fresh, Err(SourceError::Shrunk { .. }) | Ok(Extent::Data { .. }));
        prop_assert!(refused, "{fresh:?} at the end");
    }
}
