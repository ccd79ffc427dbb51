// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options with parts: correct values are accepted, and no text causes a panic.

use demand_memory::{BackingKind, FillRate};
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::config::{FillOption, MemoryOption, TestGuestOption, VhostUserOption, parse_size};
use proptest::prelude::*;

/// Words of options, which are combined in any order and with other text.
const WORDS: &[&str] = &[
    ",",
    "=",
    "size",
    "backing",
    "shmem",
    "hugetlb-1g",
    "reserve",
    "on",
    "blk",
    "socket",
    "queues",
    "seed",
    "rate=",
    "/s",
    "order",
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
        let told = |error: String| assert!(!error.is_empty());
        let _ = parse_size(&text).map_err(told);
        let _ = text.parse::<MemoryOption>().map_err(told);
        let _ = text.parse::<VhostUserOption>().map_err(told);
        let _ = text.parse::<FillOption>().map_err(told);
        let _ = text.parse::<TestGuestOption>().map_err(told);
        let _ = text.parse::<BackingKind>().map_err(told);
    }

    #[test]
    fn a_size_is_its_digits_and_its_unit(number: u64, unit in 0..5usize) {
        let bytes = u128::from(number) << (10 * unit);
        match parse_size(&format!("{number}{}", ["", "K", "M", "G", "T"][unit])) {
            Ok(size) => prop_assert_eq!(u128::from(size), bytes),
            Err(_) => prop_assert!(bytes > u128::from(u64::MAX)),
        }
        let small = number % 1000;
        let text = format!("{small}{}", ["", "k", "m", "g", "t"][unit]);
        prop_assert_eq!(parse_size(&text).unwrap(), small << (10 * unit));
    }

    #[test]
    fn memory_is_understood(
        units in 0..1u64 << 30,
        odd in 0..2u64,
        backing in prop::sample::select(&BackingKind::ALL[..]),
        reserve: bool,
    ) {
        let size = units * backing.unit() + odd * 512;
        let switch = if reserve { "on" } else { "off" };
        let text = format!("reserve={switch},size={size},backing={backing}");
        let right = units > 0 && odd == 0;
        let expected = right.then_some(MemoryOption { size, backing, reserve, thp: false });
        prop_assert_eq!(text.parse::<MemoryOption>().ok(), expected, "{}", text);
    }

    #[test]
    fn a_back_end_is_understood(socket in "[a-zA-Z0-9/._ -]{1,40}", queues: u16) {
        let parsed = format!("queues={queues},blk,socket={socket}").parse::<VhostUserOption>();
        let right = VhostUserOption { queues, ..VhostUserOption::new(DeviceKind::Blk, socket) };
        prop_assert_eq!(parsed.ok(), (1..=256).contains(&queues).then_some(right));
    }

    #[test]
    fn a_rate_is_understood(rate: u64) {
        let parsed = format!("rate={rate}/s").parse::<FillOption>();
        let right = FillOption::On(FillRate::BytesPerSecond(rate));
        prop_assert_eq!(parsed.ok(), (rate > 0).then_some(right));
    }
}
