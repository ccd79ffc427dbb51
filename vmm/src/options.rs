// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The values of command-line options that have parts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use demand_memory::{BackingKind, FillRate};
use test_guest::plan::{Arrivals, Order};

/// Splits `key=value,key=value`; a part without `=` has its key as name and an empty value.
struct Parts<'a> {
    option: &'static str,
    values: BTreeMap<&'a str, &'a str>,
}

impl<'a> Parts<'a> {
    fn new(option: &'static str, text: &'a str) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            if values.insert(key, value).is_some() {
                return Err(format!("{option}: '{key}' is given twice; give it once"));
            }
        }
        Ok(Parts { option, values })
    }

    fn take<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.values.remove(key) else { return Ok(None) };
        parse(value).map(Some).map_err(|error| format!("{}: {key}={value}: {error}", self.option))
    }

    fn end(self, known: &str) -> Result<(), String> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("{}: there is no '{key}'; it takes {known}", self.option)),
        }
    }
}

/// A number of bytes: digits, and K, M, G or T for powers of 1024.
///
/// # Errors
///
/// A text that says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("'{text}' is no size; write bytes, or a number with K, M, G or T"))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("choose on or off".into()),
    }
}

fn parse_number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "that is no number in range".into())
}

/// In what order pages are come to.
///
/// # Errors
///
/// A text that names the orders.
pub fn parse_order(name: &str) -> Result<Order, String> {
    match name {
        "sequential" => Ok(Order::Sequential),
        "random" => Ok(Order::Random),
        "strided" => Ok(Order::Strided),
        _ => Err("choose sequential, random or strided".into()),
    }
}

/// `--memory size=1G,backing=hugetlb-2m,reserve=on`, `--memory size=1G,thp=on`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryOption {
    /// Bytes.
    pub size: u64,
    /// What the memory is made of.
    pub backing: BackingKind,
    /// Whether huge pages are set aside at once.
    pub reserve: bool,
    /// Whether shared memory may use transparent huge pages.
    pub thp: bool,
}

impl FromStr for MemoryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Parts::new("--memory", text)?;
        let size =
            parts.take("size", parse_size)?.ok_or("--memory: say how much, as in size=1G")?;
        let backing = parts.take("backing", BackingKind::from_str)?.unwrap_or(BackingKind::Shmem);
        let reserve = parts.take("reserve", parse_switch)?.unwrap_or(true);
        let thp = parts.take("thp", parse_switch)?;
        parts.end("size, backing, reserve and thp")?;
        if thp.is_some() && backing != BackingKind::Shmem {
            return Err(format!(
                "--memory: thp= is about shared memory, and {backing} is huge pages already; \
                 leave it out"
            ));
        }
        if size == 0 || !size.is_multiple_of(backing.unit()) {
            let unit = backing.unit();
            return Err(format!(
                "--memory: size={size} is no multiple of the {unit} bytes of a page of {backing}"
            ));
        }
        Ok(MemoryOption { size, backing, reserve, thp: thp.unwrap_or(false) })
    }
}

/// `--vhost-user blk,socket=PATH,queues=N`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserOption {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// Number of virtqueues.
    pub queues: u16,
}

impl FromStr for VhostUserOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Parts::new("--vhost-user", text)?;
        parts
            .take(
                "blk",
                |value| if value.is_empty() { Ok(()) } else { Err("blk has no value".into()) },
            )?
            .ok_or("--vhost-user: say what device, as in blk,socket=PATH; there is only blk")?;
        let socket = parts
            .take("socket", |path| Ok(PathBuf::from(path)))?
            .ok_or("--vhost-user: say where the back-end listens, as in socket=PATH")?;
        let queues = parts.take("queues", parse_number::<u16>)?.unwrap_or(1);
        parts.end("blk, socket and queues")?;
        if queues == 0 {
            return Err("--vhost-user: queues=0: a device needs at least one".into());
        }
        Ok(VhostUserOption { socket, queues })
    }
}

/// `--fill on|off|rate=BYTES/s`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillOption {
    /// Pages arrive only when somebody wants them.
    Off,
    /// The rest arrives in the background.
    On(FillRate),
}

impl FromStr for FillOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(FillOption::On(FillRate::Unlimited)),
            "off" => Ok(FillOption::Off),
            _ => {
                let rate = text
                    .strip_prefix("rate=")
                    .ok_or("--fill: choose on, off or rate=BYTES, as in rate=100M")?;
                let rate = rate.strip_suffix("/s").unwrap_or(rate);
                match parse_size(rate)? {
                    0 => Err("--fill: a rate of 0 is off; write off".into()),
                    rate => Ok(FillOption::On(FillRate::BytesPerSecond(rate))),
                }
            }
        }
    }
}

/// `--test-guest seed=1,order=random,touches=144,...`: what the test guest does, beyond what other
/// options say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestGuestOption {
    /// What everything random comes from, the image included.
    pub seed: u64,
    /// Bytes of memory that the guest uses; `None`: all of it.
    pub window: Option<u64>,
    /// In what order units and pages are come to.
    pub order: Order,
    /// In what order the guest, the back-end and the VMM come to a unit.
    pub arrivals: Arrivals,
    /// Pages of each unit that the guest comes to, at most.
    pub touches: u32,
    /// Pages of each unit that the VMM comes to, at most.
    pub vmm_touches: u32,
    /// Requests to the disk.
    pub requests: u32,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Bytes at the end of the disk that may be written.
    pub write_area: u64,
    /// The disk as it was before anything ran.
    pub pristine: Option<PathBuf>,
    /// The disk that the back-end serves, to be compared in the end.
    pub disk: Option<PathBuf>,
}

impl FromStr for TestGuestOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Parts::new("--test-guest", text)?;
        let path = |path: &str| Ok(PathBuf::from(path));
        let option = TestGuestOption {
            seed: parts.take("seed", parse_number)?.unwrap_or(1),
            window: parts.take("window", parse_size)?,
            order: parts.take("order", parse_order)?.unwrap_or(Order::Random),
            arrivals: parts
                .take("arrivals", |name| match name {
                    "mixed" => Ok(Arrivals::Mixed),
                    "free" => Ok(Arrivals::Free),
                    _ => Err("choose mixed or free".into()),
                })?
                .unwrap_or(Arrivals::Mixed),
            touches: parts.take("touches", parse_number)?.unwrap_or(144),
            vmm_touches: parts.take("vmm-touches", parse_number)?.unwrap_or(4),
            requests: parts.take("requests", parse_number)?.unwrap_or(64),
            queue_size: parts.take("queue-size", parse_number)?.unwrap_or(256),
            write_area: parts.take("write-area", parse_size)?.unwrap_or(0),
            pristine: parts.take("pristine", path)?,
            disk: parts.take("disk", path)?,
        };
        parts.end(
            "seed, window, order, arrivals, touches, vmm-touches, requests, queue-size, write-area, \
             pristine and disk",
        )?;
        Ok(option)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("2M", 2 << 20), ("1G", 1 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "99999999999T", "1Ä"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory() {
        let option: MemoryOption = "size=1G,backing=hugetlb-2m,reserve=off".parse().unwrap();
        assert_eq!((option.size, option.backing), (1 << 30, BackingKind::Hugetlb2M));
        assert!(!option.reserve && !option.thp);
        assert!("size=1G,thp=on".parse::<MemoryOption>().unwrap().thp);
        for text in [
            "",
            "1G",
            "size=0",
            "size=3M,backing=hugetlb-2m",
            "size=1G,size=2G",
            "size=x",
            "size=1G,backing=tmpfs",
            "size=1G,a=b",
            "size=1G,backing=hugetlb-2m,thp=on",
        ] {
            assert!(text.parse::<MemoryOption>().unwrap_err().starts_with("--memory"), "{text}");
        }
    }

    #[test]
    fn vhost_user() {
        let option: VhostUserOption = "blk,socket=/a/b,queues=2".parse().unwrap();
        assert_eq!((option.socket.to_str(), option.queues), (Some("/a/b"), 2));
        for text in ["", "net,socket=x", "blk", "blk,socket=x,queues=0", "blk,socket=x,z=1"] {
            assert!(text.parse::<VhostUserOption>().is_err(), "{text}");
        }
    }

    #[test]
    fn test_guest() {
        let option: TestGuestOption =
            "seed=7,window=64M,order=strided,requests=3,disk=/d".parse().unwrap();
        assert_eq!((option.seed, option.order, option.requests), (7, Order::Strided, 3));
        assert_eq!((option.window, option.disk), (Some(64 << 20), Some("/d".into())));
        for text in
            ["seed=x", "window=all", "order=up", "arrivals=late", "queue-size=70000", "speed=1"]
        {
            assert!(text.parse::<TestGuestOption>().is_err(), "{text}");
        }
    }

    #[test]
    fn fill() {
        assert_eq!("off".parse(), Ok(FillOption::Off));
        let rate = FillOption::On(FillRate::BytesPerSecond(1 << 20));
        assert_eq!("rate=1M/s".parse(), Ok(rate));
        assert_eq!("rate=1M".parse(), Ok(rate));
        for text in ["", "yes", "rate=0", "rate="] {
            assert!(text.parse::<FillOption>().is_err(), "{text}");
        }
    }
}
