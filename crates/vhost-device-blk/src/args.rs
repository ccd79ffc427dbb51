// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use crate::server::Options;
use crate::topology::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use crate::{Error, Result};

/// The maximum number of queues of a device: vhost-user-backend assigns queues to threads with a
/// 64-bit mask.
pub const MAX_QUEUES: u16 = 64;
/// The minimum queue size: a header, a data segment and a status byte need three descriptors.
pub const MIN_QUEUE_SIZE: u16 = 4;
/// The maximum queue size in the virtio specification.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// The maximum number of threads per queue.
pub const MAX_THREADS: u16 = 256;

/// A vhost-user-blk back-end with post-copy.
#[derive(Debug, Parser)]
#[command(name = "vhost-device-blk", version, about)]
pub struct Args {
    /// Unix socket to listen on; a stale socket is replaced.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// Raw image or block device to serve.
    #[arg(long, value_name = "PATH")]
    pub disk: PathBuf,

    /// Number of request queues, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_queues: u16,

    /// Maximum queue size that the front-end may set up, in descriptors: a power of two, 4 to
    /// 32768.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue_size: u16,

    /// Requests of one queue executed at once, 1 to 256; 1 keeps them in order.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub threads: u16,

    /// Serve the disk read-only.
    #[arg(long)]
    pub read_only: bool,

    /// Logical block size in bytes: 512, 1024, 2048 or 4096. Default: the block device's own, 512
    /// for a file.
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u32>,

    /// Return space to the host when the guest discards it; `off` keeps it allocated.
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Switch::On)]
    pub discard: Switch,

    /// Initial mode of the write cache: `writeback` makes writes stable when the guest flushes
    /// them, `writethrough` before they are answered.
    #[arg(long, value_name = "writeback|writethrough", value_enum, default_value_t = Cache::Writeback)]
    pub cache: Cache,

    /// Serial number of the disk as the guest reads it, up to 20 bytes.
    #[arg(long, alias = "id", value_name = "STRING", default_value = "vhost-device-blk")]
    pub serial: String,

    /// Offer post-copy: `on` offers it if the host permits it and warns otherwise, `off` never
    /// offers it, `require` exits with status 3 if the host does not permit it.
    #[arg(long, value_name = "on|off|require", value_enum, default_value_t = Postcopy::On)]
    pub postcopy: Postcopy,

    /// Offer CONFIGURE_MEM_SLOTS, so that memory regions are added one by one.
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Switch::Off)]
    pub mem_slots: Switch,

    /// Exit after the first front-end has disconnected.
    #[arg(long)]
    pub once: bool,

    /// Write counters to this file, as JSON, after each disconnect and on exit.
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
}

/// Whether to offer post-copy.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Postcopy {
    /// Offers it if the host permits it; otherwise warns and continues without it.
    On,
    /// Never offers it.
    Off,
    /// Fails if the host does not permit it.
    Require,
}

/// The moment from which a write is on stable storage.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Cache {
    /// When the guest has flushed it.
    Writeback,
    /// When it is answered.
    Writethrough,
}

/// An option that is on or off.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl Args {
    /// Validates the values and converts them to the daemon's options.
    ///
    /// # Errors
    /// [`Error::Option`] names the first option whose value is out of range.
    pub fn into_options(self) -> Result<Options> {
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(Error::Option {
                option: "--num-queues",
                value: self.num_queues.to_string(),
                problem: format!("not within 1 to {MAX_QUEUES}"),
            });
        }
        if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&self.queue_size)
            || !self.queue_size.is_power_of_two()
        {
            return Err(Error::Option {
                option: "--queue-size",
                value: self.queue_size.to_string(),
                problem: format!("not a power of two within {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"),
            });
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            return Err(Error::Option {
                option: "--threads",
                value: self.threads.to_string(),
                problem: format!("not within 1 to {MAX_THREADS}"),
            });
        }
        if let Some(size) = self.block_size
            && !(size.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size))
        {
            return Err(Error::Option {
                option: "--block-size",
                value: size.to_string(),
                problem: format!("not a power of two within {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"),
            });
        }
        if self.serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err(Error::Option {
                option: "--serial",
                problem: format!("{} bytes, at most {VIRTIO_BLK_ID_BYTES} fit", self.serial.len()),
                value: self.serial,
            });
        }
        Ok(Options {
            socket: self.socket,
            disk: self.disk,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            threads: self.threads,
            read_only: self.read_only,
            block_size: self.block_size,
            keep_space: self.discard == Switch::Off,
            write_cache: self.cache == Cache::Writeback,
            serial: self.serial,
            postcopy: self.postcopy,
            mem_slots: self.mem_slots == Switch::On,
            once: self.once,
            stats: self.stats,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &[&str]) -> Result<Options> {
        let base = ["vhost-device-blk", "--socket", "s", "--disk", "d"];
        Args::try_parse_from(base.iter().chain(extra)).unwrap().into_options()
    }

    #[test]
    fn defaults() {
        let o = parse(&[]).unwrap();
        assert_eq!((o.num_queues, o.queue_size), (1, 256));
        assert_eq!(o.postcopy, Postcopy::On);
        assert!(!o.read_only && !o.mem_slots && !o.once && o.stats.is_none());
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
        let e = parse(&["--serial", "123456789012345678901"]).unwrap_err();
        assert_eq!(e.exit_status(), 2);
    }

    #[test]
    fn switches() {
        let o = parse(&["--postcopy", "require", "--mem-slots", "on", "--read-only"]).unwrap();
        assert_eq!(o.postcopy, Postcopy::Require);
        assert!(o.mem_slots && o.read_only);
        assert!(o.write_cache && !o.keep_space);
        let o = parse(&["--cache", "writethrough", "--discard", "off"]).unwrap();
        assert!(!o.write_cache && o.keep_space);
    }
}
