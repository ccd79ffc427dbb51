// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks of the read path of a local image: finding extents, and reading with and without
//! hashes.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a bench are small")]
#![allow(missing_docs)] // criterion's macros generate public items.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use demand_source::{Destination, HashedImage, ImageWriter, LocalFile, PageSource};

const SIZE: u64 = 16 << 20;

fn read(criterion: &mut Criterion) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&vec![7; SIZE as usize], 0).unwrap();
    let source = LocalFile::open(image.path()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (hashed, table) = (folder.path().join("image"), folder.path().join("hashes"));
    let mut writer = ImageWriter::create(&hashed, &table, SIZE, [0; 16]).unwrap();
    writer.write(0, &vec![7; SIZE as usize]).unwrap();
    writer.finish().unwrap();
    let hashed = HashedImage::open(&hashed, &table).unwrap();
    let mut at = 0;
    let mut next = move |len: u64| {
        at = (at + len) / len * len % SIZE;
        at
    };
    criterion.bench_function("demand-source: extent", |b| {
        b.iter(|| source.extent(next(4096)).unwrap());
    });
    for len in [4096, 2 << 20] {
        let mut bytes = vec![0; len as usize];
        criterion.bench_function(&format!("demand-source: read {len} bytes"), |b| {
            b.iter(|| {
                let mut destination = Destination::from(&mut bytes[..]);
                source.read_now(next(len), &mut destination).unwrap().unwrap();
            });
        });
        criterion.bench_function(&format!("demand-source: read and check {len} bytes"), |b| {
            b.iter(|| {
                let mut destination = Destination::from(&mut bytes[..]);
                hashed.read_now(next(len), &mut destination).unwrap().unwrap();
            });
        });
        criterion.bench_function(&format!("demand-source: bare pread of {len} bytes"), |b| {
            b.iter(|| image.as_file().read_exact_at(&mut bytes, next(len)).unwrap());
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = read
}
criterion_main!(benches);
