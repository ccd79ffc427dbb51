// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ranges of the configuration space and of the options, checked against the specification.

use clap::Parser;
use proptest::prelude::*;
use vhost_device_blk::args::{Args, MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE};
use vhost_device_blk::config::{CONFIG_SIZE, ConfigSpace, MAX_CONFIG_SIZE};
use vhost_device_blk::disk::{Disk, DiskOptions};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Each part that is read equals the same part of the whole, and nothing lies outside.
    #[test]
    fn config_space_parts_match_the_whole(
        sectors in 8..1u64 << 32,
        queue_size: u16,
        queues: u16,
        offset in prop_oneof![any::<u32>(), 0..300u32],
        size in prop_oneof![any::<u32>(), 0..300u32],
        write_back: bool,
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * 512).unwrap();
        let disk = Disk::open(file.path(), &DiskOptions::default()).unwrap();
        let config = ConfigSpace::new(&disk, queue_size, queues);
        let whole = config.read(0, MAX_CONFIG_SIZE as u32, write_back);
        prop_assert_eq!(whole.len(), MAX_CONFIG_SIZE);
        prop_assert_eq!(&whole[..8], &sectors.to_le_bytes()[..]);
        prop_assert_eq!(&whole[34..36], &queues.to_le_bytes()[..]);
        prop_assert!(whole[CONFIG_SIZE..].iter().all(|byte| *byte == 0));
        let part = config.read(offset, size, write_back);
        match u64::from(offset) + u64::from(size) {
            end if end <= MAX_CONFIG_SIZE as u64 => {
                prop_assert_eq!(&part[..], &whole[offset as usize..end as usize]);
            }
            _ => prop_assert!(part.is_empty()),
        }
    }

    #[test]
    fn options_out_of_their_ranges_are_named(queues: u16, size: u16, id in "[ -~]{0,30}") {
        let args = Args::try_parse_from([
            "vhost-device-blk".into(),
            "--socket=s".into(),
            "--disk=d".into(),
            format!("--num-queues={queues}"),
            format!("--queue-size={size}"),
            format!("--id={id}"),
        ]);
        let right = (1..=MAX_QUEUES).contains(&queues)
            && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size)
            && size.is_power_of_two()
            && id.len() <= 20;
        match args.unwrap().into_options() {
            Ok(_) => prop_assert!(right),
            Err(error) => {
                prop_assert!(!right, "{}", error);
                let text = error.to_string();
                prop_assert!(text.contains("--num-queues") || text.contains("--queue-size") || text.contains("--serial"));
            }
        }
    }

    #[test]
    fn powers_of_two_are_taken(power in 2..=15u32, queues in 1..=MAX_QUEUES) {
        let (size, queues) = (format!("--queue-size={}", 1u32 << power), format!("--num-queues={queues}"));
        let args = Args::try_parse_from(["blk", "--socket=s", "--disk=d", &size, &queues]).unwrap();
        prop_assert!(args.into_options().is_ok());
    }
}
