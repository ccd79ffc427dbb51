// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image behind a link to its server, and the faults of the link that every server has.

use std::any::Any;
use std::time::{Duration, Instant};

use demand_remote::Store;
use demand_remote::image::{Compression, RemoteImage, RemoteOptions};
use demand_source::{PageSource, Retry};
use test_support::proxy::{Fault, FaultProxy, Link, Target};
use test_support::servers::Web;

use crate::support::{PAGE, Place, Random, check_content, noise, read};

pub(crate) const CHUNK: usize = 64 << 10;

/// An image on a server, and a link to it.
pub(crate) struct Far {
    _place: Place,
    _server: Box<dyn Any>,
    target: Target,
    pub(crate) proxy: FaultProxy,
    pub(crate) content: Vec<u8>,
    /// The URL of its store, by the port of a link.
    url: fn(u16) -> String,
}

impl Far {
    /// Pushes an image of this number of chunks, all of noise, to a web server. Returns `None`
    /// without one.
    pub(crate) fn new(chunks: usize) -> Option<Far> {
        Far::of(chunks * CHUNK, CHUNK)
    }

    /// Pushes an image of this length with chunks of this size, in bytes.
    pub(crate) fn of(len: usize, chunk_size: usize) -> Option<Far> {
        let (place, content) = pushed(len, chunk_size);
        let web = Web::start(&place.path("store"), "")?;
        let target = Target::Port(web.port());
        let proxy = FaultProxy::start(target.clone());
        let url = |port| format!("http://127.0.0.1:{port}/");
        Some(Far { _place: place, _server: Box::new(web), target, proxy, content, url })
    }

    /// Pushes an image of this number of chunks to an object store, whose clients find the link by
    /// this process's variables. Returns `None` without one.
    #[cfg(feature = "s3")]
    pub(crate) fn bucket(chunks: usize) -> Option<Far> {
        use test_support::servers::S3;

        let (place, content) = pushed(chunks * CHUNK, CHUNK);
        let server = S3::start(&place.path(""))?;
        let target = Target::Port(server.port());
        let proxy = FaultProxy::start_at(target.clone(), S3::port_of_variables());
        let url = |_| "s3://store".to_owned();
        Some(Far { _place: place, _server: Box::new(server), target, proxy, content, url })
    }

    /// Returns the server's address.
    pub(crate) fn target(&self) -> Target {
        self.target.clone()
    }

    pub(crate) fn open(&self) -> RemoteImage {
        self.open_with(RemoteOptions::default())
    }

    pub(crate) fn open_with(&self, options: RemoteOptions) -> RemoteImage {
        self.open_by(&self.proxy, options)
    }

    /// Opens the image by another link.
    pub(crate) fn open_by(&self, proxy: &FaultProxy, options: RemoteOptions) -> RemoteImage {
        let store = Store::open(&(self.url)(proxy.port()).parse().unwrap()).unwrap();
        RemoteImage::open_with(&store, "vm", options).unwrap()
    }

    pub(crate) fn check_chunk(&self, image: &dyn PageSource, chunk: usize) {
        let bytes = read(image, chunk * CHUNK, PAGE).unwrap();
        assert!(bytes == self.content[chunk * CHUNK..][..PAGE], "chunk {chunk}");
    }
}

fn pushed(len: usize, chunk_size: usize) -> (Place, Vec<u8>) {
    let mut content = vec![0; len];
    noise(&mut content, &mut Random::new(11));
    let place = Place::new();
    let chunk_size = u32::try_from(chunk_size).unwrap();
    let raw = Compression::None;
    place.push("vm", &content, |push| push.chunk_size(chunk_size).compression(raw)).unwrap();
    (place, content)
}

/// Faults that the client outlasts by itself.
pub(crate) fn broken_answers_are_asked_for_again(far: &Far) {
    let image = far.open();
    far.proxy.set_link(Link::round_trip(Duration::from_millis(50)));
    let faults = [
        Fault::Cut(0),
        Fault::Cut(20_000),
        Fault::Status(503, "SlowDown"),
        Fault::Status(500, "InternalError"),
        // The longest time without a byte is 5 seconds.
        Fault::Stall(20_000),
    ];
    for (chunk, fault) in faults.into_iter().enumerate() {
        far.proxy.set_fault(fault, 1);
        let (before, begun) = (far.proxy.requests(), Instant::now());
        far.check_chunk(&image, chunk);
        let requests = far.proxy.requests() - before;
        assert_eq!((requests, far.proxy.faults_left()), (2, 0), "{fault:?}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{fault:?}: {:?}", begun.elapsed());
    }
    far.proxy.clear_fault();
    check_content(&image, &far.content);
}

/// Faults that fail a read, with one line, and are over with the next one.
pub(crate) fn changed_answers_are_never_content(far: &Far) {
    let image = far.open();
    let faults = [
        (Fault::Flip(20_000), 1, "digest of the stored chunk does not match"),
        (Fault::Truncate(20_000), 1, "the answer has 20000"),
        (Fault::Status(403, "ExpiredToken"), 1, "check credentials and permissions"),
        // The client's own attempts are three.
        (Fault::Status(503, "SlowDown"), 3, "SlowDown"),
        (Fault::Refuse, usize::MAX, "check the network and the store"),
    ];
    for (chunk, (fault, times, words)) in faults.into_iter().enumerate() {
        far.proxy.set_fault(fault, times);
        let error = read(&image, chunk * CHUNK, PAGE).unwrap_err();
        let text = error.to_string();
        println!("{text}");
        assert!(text.contains(words) && !text.contains('\n'), "{fault:?}: {text}");
        assert_eq!(error.retry(), Retry::Later, "{fault:?}");
        assert!(times == usize::MAX || far.proxy.faults_left() == 0, "{fault:?}");
        far.proxy.clear_fault();
        far.check_chunk(&image, chunk);
    }
    check_content(&image, &far.content);
}
