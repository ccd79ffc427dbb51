// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores from a pager that is wrong, or absent.

use demand_tests::page_server::PageServer;
use demand_tests::refusal::{FAILED, refused};
use demand_tests::tiny_snapshot::TinySnapshot;

/// The pager's page differs from its hash.
#[test]
fn wrong_pages_reach_no_guest() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let page = snapshot.flip().unwrap();
    let socket = snapshot.at("pager.sock");
    let mut pager = PageServer::pager(&snapshot.dir(), &socket).unwrap();
    pager.restart().unwrap();
    let source = format!("pager:{}", socket.display());
    let mut restore = snapshot.restore_from(&source, &[]).unwrap();
    // A pager on a busy machine may be silent for seconds.
    restore.args(["--lazy", "off", "--source-limit", "8", "--serial", "off", "--log-level", "off"]);
    let words = [&*format!("offset {page} of {source}"), "page hashes", "--source-limit"];
    refused(&mut restore, FAILED, &words);

    // A pager that is away is refused at once.
    drop(pager);
    let mut restore = snapshot.restore_from(&source, &[]).unwrap();
    refused(&mut restore, FAILED, &["state: cannot use pager:", "the pager cannot be reached"]);
}
