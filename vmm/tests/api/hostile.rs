// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Any bytes are answered, or the connection is closed.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use demand_vmm::api::server::serve;
use proptest::prelude::*;

use crate::harness::{Record, answers, rest};

/// Pieces of requests, which are combined in any order and with other bytes.
const PIECES: &[&str] = &[
    "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n",
    "PUT /api/v1/snapshot HTTP/1.1\r\n",
    "POST /api/v1/pause HTTP/1.0\r\n",
    "GET /api/v1/events HTTP/1.1\r\n",
    "HEAD",
    " / ",
    "HTTP/1.1",
    "Host: a\r\n",
    "Content-Length: 20\r\n",
    "Content-Length: 0\r\n",
    "Content-Length: 18446744073709551616\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Expect: 100-continue\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "\r\n",
    "\n",
    ": ",
    r#"{"destination":"/a"}"#,
    "{",
    "\0",
    "é",
];

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop::collection::vec(prop::sample::select(PIECES), 0..16);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        pieces.clone().prop_map(|pieces| pieces.concat().into_bytes()),
        (pieces, any::<prop::sample::Index>(), any::<u8>()).prop_map(|(pieces, index, byte)| {
            let mut bytes = pieces.concat().into_bytes();
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            bytes
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn any_input_is_answered_or_disconnected(bytes in bytes()) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&bytes).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let begun = Instant::now();
        let record = Record::new();
        record.events.end(0, None);
        serve(&server, &*record);
        drop(server);
        prop_assert!(begun.elapsed() < Duration::from_secs(5));
        let got = rest(&client);
        // (The answers to HEAD have the lengths of bodies that do not follow.)
        if !bytes.windows(4).any(|window| window == b"HEAD") {
            let whole = answers(&got);
            prop_assert!(!whole.is_empty() || bytes.iter().all(|b| b"\r\n".contains(b)));
        }
    }
}
