// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--test-guest`: no text causes a panic.

use proptest::prelude::*;
use test_vmm::options::TestGuestOption;

/// Words of the option, which are combined in any order and with other text.
const WORDS: &[&str] = &[
    ",",
    "=",
    "seed",
    "window",
    "order",
    "random",
    "arrivals",
    "touches",
    "queue-size",
    "disk",
    "18446744073709551615",
    "0",
    "K",
    "T",
    "-1",
    "é",
    "\0",
    " ",
    "4M",
];

fn text() -> impl Strategy<Value = String> {
    let words = prop::collection::vec(prop::sample::select(WORDS), 0..12);
    prop_oneof![any::<String>(), words.prop_map(|words| words.concat())]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn no_text_panics(text in text()) {
        if let Err(error) = text.parse::<TestGuestOption>() {
            assert!(!error.to_string().is_empty());
        }
    }
}
