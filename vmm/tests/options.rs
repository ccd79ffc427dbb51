// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options with parts: correct values are accepted, and no text causes a panic.

use demand_memory::{BackingKind, FillRate};
use demand_vmm::cli::parse::ParseError;
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::config::size::parse_size;
use demand_vmm::config::{FillConfig, MemoryConfig, VhostUserConfig};
use proptest::prelude::*;

/// Words of options, which are combined in any order and with other text.
const WORDS: &[&str] = &[
    ",",
    "=",
    "size",
    "backing",
    "shmem",
    "hugetlb-1g",
    "guest-memfd",
    "reserve",
    "in-flight",
    "chunk",
    "order",
    "rate",
    "on",
    "blk",
    "socket",
    "queues",
    "rate=",
    "/s",
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
        let told = |error: ParseError| assert!(!error.to_string().is_empty());
        let _ = parse_size(&text).map_err(|error| told(error.into()));
        let _ = text.parse::<MemoryConfig>().map_err(told);
        let _ = text.parse::<VhostUserConfig>().map_err(told);
        let _ = text.parse::<FillConfig>().map_err(told);
        let _ = text.parse::<BackingKind>().map_err(|error| assert!(!error.to_string().is_empty()));
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
        plain: bool,
    ) {
        let size = units * backing.unit() + odd * 512;
        let switch = if reserve { "on" } else { "off" };
        let text = match plain {
            true => format!("{size},reserve={switch},backing={backing}"),
            false => format!("reserve={switch},size={size},backing={backing}"),
        };
        let right = units > 0 && odd == 0;
        let expected = right.then_some(MemoryConfig { size, backing, reserve, thp: false });
        prop_assert_eq!(text.parse::<MemoryConfig>().ok(), expected, "{}", text);
    }

    #[test]
    fn a_back_end_is_understood(socket in "[a-zA-Z0-9/._ =,-]{1,40}", queues: u16) {
        let doubled = socket.replace(',', ",,");
        let parsed = format!("queues={queues},blk,socket={doubled}").parse::<VhostUserConfig>();
        let right = VhostUserConfig { queues, ..VhostUserConfig::new(DeviceKind::Blk, socket) };
        prop_assert_eq!(parsed.ok(), (1..=256).contains(&queues).then_some(right));
    }

    #[test]
    fn a_rate_is_understood(rate: u64) {
        let parsed = format!("rate={rate}/s").parse::<FillConfig>();
        let right = FillConfig::On(FillRate::BytesPerSecond(rate).into());
        prop_assert_eq!(parsed.ok(), (rate > 0).then_some(right));
    }
}
