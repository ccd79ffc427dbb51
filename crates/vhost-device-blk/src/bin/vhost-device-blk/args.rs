// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Parser, ValueEnum};
use log::LevelFilter;
use vhost_device_blk::{Endpoint, MAX_BLOCK_SIZE, MAX_QUEUES, MIN_BLOCK_SIZE, Options, Postcopy};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

/// The minimum queue size: a header, a data segment and a status byte need three descriptors.
pub(crate) const MIN_QUEUE_SIZE: u16 = 4;
/// The maximum queue size in the virtio specification.
pub(crate) const MAX_QUEUE_SIZE: u16 = 32768;

/// The maximum number of threads per queue.
pub(crate) const MAX_THREADS: u16 = 256;

/// Error for an option with an invalid value.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {option} {value}: {problem}; see --help")]
pub(crate) struct OptionError {
    /// The option as written on the command line.
    option: &'static str,
    /// The given value.
    value: String,
    /// The reason why the value is invalid.
    problem: String,
}

/// A vhost-user-blk back-end with post-copy.
#[derive(Debug, Parser)]
#[command(name = "vhost-device-blk", version, about)]
pub(crate) struct Args {
    /// Unix socket to listen on; a stale socket is replaced. Without this option and --fd, the
    /// socket is inherited from the service manager (LISTEN_FDS).
    #[arg(long, visible_alias = "socket", value_name = "PATH", conflicts_with = "fd")]
    pub(crate) socket_path: Option<PathBuf>,

    /// Number of an inherited descriptor: a Unix stream socket that listens, or that is connected
    /// to the front-end.
    #[arg(long, value_name = "FDNUM", allow_negative_numbers = true)]
    pub(crate) fd: Option<u32>,

    /// Print the capabilities of this back-end as JSON, and exit; other options are ignored.
    #[arg(long)]
    pub(crate) print_capabilities: bool,

    /// Raw image or block device to serve.
    #[arg(long, visible_alias = "disk", value_name = "PATH")]
    pub(crate) blk_file: PathBuf,

    /// Lock the image, so that no other process writes to it meanwhile; `off` for images that
    /// several processes write to in turns.
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Switch::On)]
    pub(crate) lock: Switch,

    /// Number of request queues, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub(crate) num_queues: u16,

    /// Maximum queue size that the front-end may set up, in descriptors: a power of two, 4 to
    /// 32768.
    #[arg(long, value_name = "N", default_value_t = 1024, allow_negative_numbers = true)]
    pub(crate) queue_size: u16,

    /// Requests of one queue executed at once, 1 to 256; 1 keeps them in order.
    #[arg(long, value_name = "N", default_value_t = 16, allow_negative_numbers = true)]
    pub(crate) threads: u16,

    /// Serve the disk read-only.
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Logical block size in bytes: 512, 1024, 2048 or 4096. Default: the block device's own, 512
    /// for a file.
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    pub(crate) block_size: Option<u32>,

    /// Return space to the host when the guest discards it; `off` keeps it allocated.
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Switch::On)]
    pub(crate) discard: Switch,

    /// Initial mode of the write cache: `writeback` makes writes stable when the guest flushes
    /// them, `writethrough` before they are answered.
    #[arg(long, value_name = "writeback|writethrough", value_enum, default_value_t = Cache::Writeback)]
    pub(crate) cache: Cache,

    /// Serial number of the disk as the guest reads it, up to 20 bytes.
    #[arg(long, alias = "id", value_name = "STRING", default_value = "vhost-device-blk")]
    pub(crate) serial: String,

    /// Offer post-copy: `on` offers it if the host permits it and warns otherwise, `off` never
    /// offers it, `require` exits with status 3 if the host does not permit it.
    #[arg(long, value_name = "on|off|require", value_enum, default_value_t = PostcopyArg::On)]
    pub(crate) postcopy: PostcopyArg,

    /// Offer CONFIGURE_MEM_SLOTS, so that memory regions are added one by one.
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Switch::Off)]
    pub(crate) mem_slots: Switch,

    /// Exit after the first front-end has disconnected.
    #[arg(long)]
    pub(crate) once: bool,

    /// Write counters to this file, as JSON: at the start, on SIGUSR1, after each disconnect and on
    /// exit.
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,

    /// Report the counters every so many seconds as well, as on SIGUSR1: a line of JSON in the log,
    /// and the file of --stats.
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86400),
        allow_negative_numbers = true
    )]
    pub(crate) stats_interval: Option<u64>,

    /// Append the log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,

    /// Log more: -v events such as connections, -vv details, -vvv everything.
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "log_level")]
    pub(crate) verbose: u8,

    /// Log messages of this level and above. Default: that of the variable RUST_LOG, or warn.
    #[arg(long, value_name = "LEVEL", value_parser = level_parser())]
    pub(crate) log_level: Option<LevelFilter>,
}

/// Returns the parser of a level, whose error lists the levels.
fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .map(|level| level.parse().expect("each of them is the name of a level"))
}

/// Whether to offer post-copy, as an option.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum PostcopyArg {
    /// Offers it if the host permits it; otherwise warns and continues without it.
    On,
    /// Never offers it.
    Off,
    /// Fails if the host does not permit it.
    Require,
}

impl From<PostcopyArg> for Postcopy {
    fn from(arg: PostcopyArg) -> Self {
        match arg {
            PostcopyArg::On => Postcopy::On,
            PostcopyArg::Off => Postcopy::Off,
            PostcopyArg::Require => Postcopy::Require,
        }
    }
}

/// The moment from which a write is on stable storage.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Cache {
    /// When the guest has flushed it.
    Writeback,
    /// When it is answered.
    Writethrough,
}

/// An option that is on or off.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl Args {
    /// Returns the level of the log, if the command line sets it.
    pub(crate) fn log_level(&self) -> Option<LevelFilter> {
        self.log_level.or(match self.verbose {
            0 => None,
            1 => Some(LevelFilter::Info),
            2 => Some(LevelFilter::Debug),
            _ => Some(LevelFilter::Trace),
        })
    }

    /// Validates the values and converts them to the options of a daemon on `socket`.
    ///
    /// # Errors
    /// [`OptionError`] names the first option whose value is out of range.
    pub(crate) fn into_options(self, socket: Endpoint) -> Result<Options, OptionError> {
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(OptionError {
                option: "--num-queues",
                value: self.num_queues.to_string(),
                problem: format!("not within 1 to {MAX_QUEUES}"),
            });
        }
        if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&self.queue_size)
            || !self.queue_size.is_power_of_two()
        {
            return Err(OptionError {
                option: "--queue-size",
                value: self.queue_size.to_string(),
                problem: format!("not a power of two within {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"),
            });
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            return Err(OptionError {
                option: "--threads",
                value: self.threads.to_string(),
                problem: format!("not within 1 to {MAX_THREADS}"),
            });
        }
        if let Some(size) = self.block_size
            && !(size.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size))
        {
            return Err(OptionError {
                option: "--block-size",
                value: size.to_string(),
                problem: format!("not a power of two within {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"),
            });
        }
        if self.serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err(OptionError {
                option: "--serial",
                problem: format!("{} bytes, at most {VIRTIO_BLK_ID_BYTES} fit", self.serial.len()),
                value: self.serial,
            });
        }
        for (option, output) in [("--stats", &self.stats), ("--log-file", &self.log_file)] {
            if let Some(output) = output
                && is_same(output, &self.blk_file)
            {
                return Err(OptionError {
                    option,
                    value: output.display().to_string(),
                    problem: "the disk itself, which it would destroy".into(),
                });
            }
        }
        Ok(Options {
            socket,
            disk: self.blk_file,
            share_disk: self.lock == Switch::Off,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            threads: self.threads,
            read_only: self.read_only,
            block_size: self.block_size,
            keep_space: self.discard == Switch::Off,
            write_cache: self.cache == Cache::Writeback,
            serial: self.serial,
            postcopy: self.postcopy.into(),
            mem_slots: self.mem_slots == Switch::On,
            once: self.once,
            stats: self.stats,
            stats_interval: self.stats_interval.map(Duration::from_secs),
        })
    }
}

/// Returns whether both paths lead to one existing file.
fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    identity(one).is_some_and(|one| Some(one) == identity(other))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn args(extra: &[&str]) -> Args {
        let base = ["vhost-device-blk", "--socket-path", "s", "--blk-file", "d"];
        Args::try_parse_from(base.iter().chain(extra)).unwrap()
    }

    #[test]
    fn outputs_do_not_destroy_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("disk"), "data").unwrap();
        std::os::unix::fs::symlink(at("disk"), at("link")).unwrap();
        std::fs::hard_link(at("disk"), at("hard")).unwrap();
        let parse = |option: &str, file: &str| {
            let words = ["blk", "--socket-path", "s", "--blk-file", &at("disk"), option, &at(file)];
            Args::try_parse_from(words).unwrap().into_options(Endpoint::Path("s".into()))
        };
        for option in ["--stats", "--log-file"] {
            for file in ["disk", "link", "hard"] {
                let error = parse(option, file).unwrap_err().to_string();
                assert!(error.contains(option) && error.contains("the disk itself"), "{error}");
            }
            assert!(parse(option, "another").is_ok());
        }
    }

    fn parse(extra: &[&str]) -> Result<Options, OptionError> {
        args(extra).into_options(Endpoint::Path("s".into()))
    }

    #[test]
    fn defaults() {
        let o = parse(&[]).unwrap();
        assert_eq!((o.num_queues, o.queue_size), (1, 1024));
        assert_eq!(o.postcopy, Postcopy::On);
        assert!(!o.read_only && !o.mem_slots && !o.once && o.stats.is_none());
        assert!(!o.share_disk && o.stats_interval.is_none());
    }

    #[test]
    fn former_names_are_aliases() {
        let args = Args::try_parse_from(["blk", "--socket", "s", "--disk", "d"]).unwrap();
        assert_eq!(args.socket_path, Some("s".into()));
        assert_eq!(args.blk_file, PathBuf::from("d"));
    }

    #[test]
    fn socket_is_given_once() {
        let parse = |extra: &[&str]| {
            Args::try_parse_from(["blk", "--blk-file", "d"].iter().chain(extra)).is_ok()
        };
        assert!(parse(&["--fd", "3"]) && parse(&["--socket-path", "s"]) && parse(&[]));
        assert!(!parse(&["--fd", "3", "--socket-path", "s"]));
        assert!(!parse(&["--fd", "3", "--socket", "s"]) && !parse(&["--fd", "-1"]));
    }

    #[test]
    fn log_levels() {
        assert_eq!(args(&[]).log_level(), None);
        assert_eq!(args(&["-v"]).log_level(), Some(LevelFilter::Info));
        assert_eq!(args(&["-vv"]).log_level(), Some(LevelFilter::Debug));
        assert_eq!(args(&["-vvvv"]).log_level(), Some(LevelFilter::Trace));
        assert_eq!(args(&["--log-level", "off"]).log_level(), Some(LevelFilter::Off));
        for bad in [&["-v", "--log-level", "info"][..], &["--log-level", "loud"]] {
            let base = ["blk", "--socket", "s", "--disk", "d"];
            assert!(Args::try_parse_from(base.iter().chain(bad)).is_err());
        }
    }

    #[test]
    fn bounds() {
        assert!(parse(&["--num-queues", "0"]).is_err());
        assert!(parse(&["--num-queues", "65"]).is_err());
        assert!(parse(&["--num-queues", "64"]).is_ok());
        assert!(parse(&["--queue-size", "2"]).is_err());
        assert!(parse(&["--queue-size", "100"]).is_err());
        assert!(parse(&["--queue-size", "32768"]).is_ok());
        assert!(parse(&["--threads", "0"]).is_err());
        assert!(parse(&["--threads", "257"]).is_err());
        assert!(parse(&["--block-size", "1000"]).is_err());
        assert!(parse(&["--block-size", "8192"]).is_err());
        assert_eq!(parse(&["--block-size", "4096"]).unwrap().block_size, Some(4096));
        assert_eq!(parse(&["--id", "12345678901234567890"]).unwrap().serial.len(), 20);
        assert!(parse(&["--serial", "123456789012345678901"]).is_err());
    }

    #[test]
    fn switches() {
        let o = parse(&["--postcopy", "require", "--mem-slots", "on", "--read-only"]).unwrap();
        assert_eq!(o.postcopy, Postcopy::Require);
        assert!(o.mem_slots && o.read_only);
        assert!(o.write_cache && !o.keep_space);
        let o = parse(&["--cache", "writethrough", "--discard", "off"]).unwrap();
        assert!(!o.write_cache && o.keep_space);
        let o = parse(&["--lock", "off", "--stats-interval", "5"]).unwrap();
        assert!(o.share_disk && o.stats_interval == Some(Duration::from_secs(5)));
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000, failure_persistence: None, ..ProptestConfig::default()
        })]

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
            match args.unwrap().into_options(Endpoint::Path("s".into())) {
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
            prop_assert!(parse(&[&size, &queues]).is_ok());
        }
    }
}
