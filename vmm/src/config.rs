// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command-line options whose values have parts, such as `size=1G,thp=on`.

pub mod device_kind;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use demand_memory::{BackingKind, FillRate};
use test_guest::plan::{Arrivals, Order};

use crate::config::device_kind::{DeviceKind, MAX_QUEUE_SIZE};

/// Splits `key=value,key=value`. A part without `=` becomes a key with an empty value.
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
            Some(key) => Err(format!("{}: unknown key '{key}'; it takes {known}", self.option)),
        }
    }
}

/// Parses a number of bytes: digits, optionally followed by K, M, G or T for powers of 1024.
///
/// # Errors
///
/// A text that describes the syntax of a size.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift)).ok_or_else(|| {
        format!("'{text}' is not a size; give a number of bytes, or one with K, M, G or T")
    })
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("choose on or off".into()),
    }
}

fn parse_number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "it is not a number in range".into())
}

/// Parses the order in which pages are touched.
///
/// # Errors
///
/// A text that lists the orders.
pub fn parse_order(name: &str) -> Result<Order, String> {
    match name {
        "sequential" => Ok(Order::Sequential),
        "random" => Ok(Order::Random),
        "strided" => Ok(Order::Strided),
        _ => Err("choose sequential, random or strided".into()),
    }
}

/// The value of `--memory`, as in `size=1G,backing=hugetlb-2m,reserve=on` or `size=1G,thp=on`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryOption {
    /// Size of the memory, in bytes.
    pub size: u64,
    /// The backing of the memory.
    pub backing: BackingKind,
    /// Whether huge pages are reserved before they are used.
    pub reserve: bool,
    /// Whether shared memory may use transparent huge pages.
    pub thp: bool,
}

impl MemoryOption {
    /// Returns the option with these parts, if they are compatible.
    ///
    /// # Errors
    ///
    /// A text that names the incompatible part.
    pub fn checked(
        size: u64,
        backing: BackingKind,
        reserve: bool,
        thp: Option<bool>,
    ) -> Result<Self, String> {
        if thp.is_some() && backing != BackingKind::Shmem {
            return Err(format!(
                "--memory: thp= applies to shmem only, and {backing} is huge pages already; leave \
                 it out"
            ));
        }
        if size == 0 || !size.is_multiple_of(backing.unit()) {
            let unit = backing.unit();
            return Err(format!(
                "--memory: size={size} is not a multiple of the {unit} bytes of a page of {backing}"
            ));
        }
        Ok(MemoryOption { size, backing, reserve, thp: thp.unwrap_or(false) })
    }
}

impl FromStr for MemoryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let RestoreMemory { size, backing, reserve, thp } = text.parse()?;
        let size = size.ok_or("--memory: the size is missing; give it, as in size=1G")?;
        let backing = backing.unwrap_or(BackingKind::Shmem);
        MemoryOption::checked(size, backing, reserve.unwrap_or(true), thp)
    }
}

/// The value of `restore --memory`, as in `backing=hugetlb-2m`: the properties of a restored
/// guest's memory that differ from the snapshot's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreMemory {
    /// Size in bytes, which must equal the snapshot's.
    pub size: Option<u64>,
    /// The backing of the memory.
    pub backing: Option<BackingKind>,
    /// Whether huge pages are reserved before they are used.
    pub reserve: Option<bool>,
    /// Whether shared memory may use transparent huge pages.
    pub thp: Option<bool>,
}

impl FromStr for RestoreMemory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Parts::new("--memory", text)?;
        let option = RestoreMemory {
            size: parts.take("size", parse_size)?,
            backing: parts.take("backing", BackingKind::from_str)?,
            reserve: parts.take("reserve", parse_switch)?,
            thp: parts.take("thp", parse_switch)?,
        };
        parts.end("size, backing, reserve and thp")?;
        Ok(option)
    }
}

/// The treatment of a back-end while memory is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lazy {
    /// Its accesses are trapped if it offers post-copy; otherwise it is refused.
    #[default]
    Auto,
    /// Its accesses are trapped. It must offer post-copy, even if no page is missing.
    Postcopy,
    /// All memory is filled before the back-end sees it.
    Fill,
    /// The back-end is refused.
    Refuse,
}

impl FromStr for Lazy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Lazy::Auto),
            "postcopy" => Ok(Lazy::Postcopy),
            "fill" => Ok(Lazy::Fill),
            "refuse" => Ok(Lazy::Refuse),
            "shadow" => Err("it is not supported; choose auto, postcopy, fill or refuse".into()),
            _ => Err("choose auto, postcopy, fill or refuse".into()),
        }
    }
}

/// The value of `--vhost-user`, as in `blk,socket=PATH,queues=N` or
/// `net,socket=PATH,mac=02:00:00:00:00:01`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserOption {
    /// The kind of device that the guest sees.
    pub kind: DeviceKind,
    /// The back-end's socket.
    pub socket: PathBuf,
    /// Number of virtqueues. A restored device keeps the number that it had.
    pub queues: u16,
    /// Largest size of a queue, in descriptors. A restored device keeps the size that it had.
    pub queue_size: u16,
    /// The treatment of the back-end while memory is missing.
    pub lazy: Lazy,
    /// The device's name in messages; by default, its kind and position.
    pub id: Option<String>,
    /// A network card's address; by default the back-end's, or else one derived from the position.
    pub mac: Option<[u8; 6]>,
    /// The guest's address on a vsock (CID); by default, the back-end's.
    pub cid: Option<u64>,
}

impl VhostUserOption {
    /// Creates the option for a device of this kind whose back-end listens on `socket`, with
    /// defaults for all other parts.
    pub fn new(kind: DeviceKind, socket: impl Into<PathBuf>) -> Self {
        VhostUserOption {
            kind,
            socket: socket.into(),
            queues: kind.fixed_queues().unwrap_or(1),
            queue_size: kind.queue_size(),
            lazy: Lazy::Auto,
            id: None,
            mac: None,
            cid: None,
        }
    }
}

impl FromStr for VhostUserOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Parts::new("--vhost-user", text)?;
        let kind = take_kind(&mut parts)?;
        let socket = parts
            .take("socket", |path| match path {
                "" => Err("the path is empty; name the socket that the back-end listens on".into()),
                path => Ok(PathBuf::from(path)),
            })?
            .ok_or(
                "--vhost-user: the socket of the back-end is missing; name it, as in socket=PATH",
            )?;
        let unsaid = VhostUserOption::new(kind, socket);
        let option = VhostUserOption {
            queues: parts.take("queues", |n| parse_queues(kind, n))?.unwrap_or(unsaid.queues),
            queue_size: parts.take("queue-size", parse_queue_size)?.unwrap_or(unsaid.queue_size),
            lazy: parts.take("lazy", Lazy::from_str)?.unwrap_or(unsaid.lazy),
            id: parts.take("id", parse_name)?,
            mac: if kind == DeviceKind::Net { parts.take("mac", parse_mac)? } else { None },
            cid: if kind == DeviceKind::Vsock { parts.take("cid", parse_cid)? } else { None },
            ..unsaid
        };
        let more = match kind {
            DeviceKind::Net => ", mac",
            DeviceKind::Vsock => ", cid",
            DeviceKind::Blk | DeviceKind::Rng | DeviceKind::Console => "",
        };
        parts.end(&format!("{kind}, socket, queues, queue-size, lazy, id{more}"))?;
        Ok(option)
    }
}

/// Takes the kind of device, which is a part without a value.
fn take_kind(parts: &mut Parts<'_>) -> Result<DeviceKind, String> {
    let none =
        |value: &str| if value.is_empty() { Ok(()) } else { Err("it takes no value".into()) };
    let mut found = None;
    for kind in DeviceKind::ALL {
        if parts.take(kind.name(), none)?.is_some() && found.replace(kind).is_some() {
            return Err(
                "--vhost-user: it names more than one device; give the option once for each".into(),
            );
        }
    }
    found.ok_or_else(|| {
        let known = DeviceKind::known();
        format!("--vhost-user: the device is missing; name it, as in blk,socket=PATH; {known}")
    })
}

fn parse_queues(kind: DeviceKind, text: &str) -> Result<u16, String> {
    match (parse_number(text)?, kind.fixed_queues()) {
        (0, _) => Err("a device needs at least one".into()),
        (queues, Some(fixed)) if queues != fixed => {
            Err(format!("a device {kind} has {fixed}; leave it out"))
        }
        // The vhost-user protocol numbers no more vrings than this.
        (queues, _) if queues > 256 => Err("a device has at most 256".into()),
        (queues, _) => Ok(queues),
    }
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    match parse_number::<u16>(text)? {
        size if size.is_power_of_two() && size >= MIN_QUEUE_SIZE => Ok(size),
        _ => Err(format!("it must be a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}")),
    }
}

/// Smallest size of a queue: a request to a disk has three descriptors.
const MIN_QUEUE_SIZE: u16 = 4;

/// Whether `text` can be a device's name. The limits keep messages to one short line.
pub(crate) fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.len() <= 32 && text.chars().all(good)
}

fn parse_name(text: &str) -> Result<String, String> {
    match is_name(text) {
        true => Ok(text.into()),
        false => Err("a name has 1 to 32 letters, digits, or any of - _ .".into()),
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    const LIKE: &str = "it must look like 02:00:00:00:00:01";
    let byte = |part: &str| {
        let hex = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
        hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac = <[u8; 6]>::try_from(bytes.ok_or(LIKE)?).map_err(|_| LIKE)?;
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err("it is not a unicast address".into());
    }
    Ok(mac)
}

fn parse_cid(text: &str) -> Result<u64, String> {
    // 0 to 2 denote the hypervisor, the local loop and the host (virtio 1.2, section 5.10.4).
    match parse_number::<u64>(text)? {
        cid if (3..u64::from(u32::MAX)).contains(&cid) => Ok(cid),
        _ => Err("a guest has an address from 3 to 4294967294".into()),
    }
}

/// The value of `--fill`: `on`, `off` or `rate=BYTES/s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillOption {
    /// Pages arrive only when they are touched.
    Off,
    /// The remaining pages are fetched in the background.
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
                    0 => Err("--fill: rate=0 fills nothing; use off".into()),
                    rate => Ok(FillOption::On(FillRate::BytesPerSecond(rate))),
                }
            }
        }
    }
}

/// The value of `--test-guest`, as in `seed=1,order=random,touches=144`: the parts of the test
/// guest's workload that no other option determines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestGuestOption {
    /// Seed of all random choices, the image included.
    pub seed: u64,
    /// Bytes of memory that the guest uses; `None`: all memory.
    pub window: Option<u64>,
    /// The order in which units and pages are touched.
    pub order: Order,
    /// The order in which the guest, the back-end and the VMM reach a unit.
    pub arrivals: Arrivals,
    /// Largest number of pages of each unit that the guest touches.
    pub touches: u32,
    /// Largest number of pages of each unit that the VMM touches.
    pub vmm_touches: u32,
    /// Number of requests to the disk.
    pub requests: u32,
    /// Size of each queue, in descriptors.
    pub queue_size: u16,
    /// Size of the writable area at the end of the disk, in bytes.
    pub write_area: u64,
    /// A file with the disk's content before the run.
    pub pristine: Option<PathBuf>,
    /// The disk that the back-end serves, which is compared after the run.
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

/// The point from which a restored guest's clocks continue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ClockOption {
    /// Where they stopped: to the guest, no time has passed, and its wall clock is late.
    #[default]
    Keep,
    /// Where they would be if the guest had only been paused: its wall clock stays right.
    Host,
}

/// The action when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnPanic {
    /// The panic is logged, and the guest's kernel proceeds as its `panic=` parameter says.
    #[default]
    Ignore,
    /// The VM is paused.
    Pause,
    /// The run ends with an error.
    Shutdown,
    /// The guest is reset.
    Reset,
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
        let expected =
            VhostUserOption { queues: 2, ..VhostUserOption::new(DeviceKind::Blk, "/a/b") };
        assert_eq!(option, expected);
        let option: VhostUserOption =
            "socket=s,net,mac=02:00:00:00:aB:01,lazy=fill,id=lan,queue-size=64".parse().unwrap();
        assert_eq!((option.kind, option.queues, option.queue_size), (DeviceKind::Net, 2, 64));
        assert_eq!((option.mac, option.lazy), (Some([2, 0, 0, 0, 0xab, 1]), Lazy::Fill));
        assert_eq!(option.id.as_deref(), Some("lan"));
        let option: VhostUserOption = "vsock,socket=s,cid=3".parse().unwrap();
        assert_eq!((option.cid, option.queues, option.lazy), (Some(3), 3, Lazy::Auto));
        for text in [
            "",
            "fs,socket=x",
            "blk",
            "blk,socket=",
            "blk=1,socket=x",
            "blk,rng,socket=x",
            "blk,socket=x,queues=0",
            "blk,socket=x,queues=257",
            "net,socket=x,queues=4",
            "blk,socket=x,queue-size=100",
            "blk,socket=x,queue-size=2",
            "blk,socket=x,lazy=shadow",
            "blk,socket=x,lazy=never",
            "blk,socket=x,id=a b",
            "blk,socket=x,mac=02:00:00:00:00:01",
            "net,socket=x,mac=02:00:00:00:00",
            "net,socket=x,mac=01:00:00:00:00:01",
            "net,socket=x,mac=+2:00:00:00:00:01",
            "vsock,socket=x,cid=2",
            "blk,socket=x,z=1",
        ] {
            let error = text.parse::<VhostUserOption>().unwrap_err();
            assert!(error.starts_with("--vhost-user: "), "{text}: {error}");
        }
        let error = "blk,socket=x,lazy=shadow".parse::<VhostUserOption>().unwrap_err();
        assert!(error.contains("is not supported"), "{error}");
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
