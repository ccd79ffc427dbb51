// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The texts of the command line: options whose values have parts, such as `size=1G,thp=on`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use demand_memory::{BackingKind, FillOptions, FillRate, InFlight, ParseBackingKindError};

use crate::bench::{Access, Order, SourceOption};
use crate::config::device::{
    DeviceConfigError, check_cid, check_name, check_queue_size, check_queues, parse_mac,
};
use crate::config::device_kind::DeviceKind;
use crate::config::fill::{check_chunk, check_rate, parse_order};
use crate::config::size::{SizeError, parse_size};
use crate::config::working_set::DEFAULT_SECONDS;
use crate::config::{
    CacheConfig, CacheConfigError, FillConfig, FillError, Lazy, MemoryConfig, MemoryError,
    RestoreMemory, SerialConfig, VhostUserConfig, WorkingSetConfig, WorkingSetMode,
};

/// Errors in the value of an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// A key is given twice.
    #[error("{option}: '{key}' is given twice; give it once")]
    Twice {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
    },
    /// The option does not have such a key.
    #[error("{option}: unknown key '{key}'; it takes {known}")]
    UnknownKey {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
        /// The keys that the option has.
        known: String,
    },
    /// The value of a key is wrong.
    #[error("{option}: {key}={value}: {source}")]
    Part {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// The error in the value.
        source: Box<ParseError>,
    },
    /// The value is none of those that exist, which this text lists.
    #[error("choose {0}")]
    Choice(&'static str),
    /// The value is not a number, or too large.
    #[error("it is not a number in range")]
    Number,
    /// The value is not a number of bytes.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The backing does not exist.
    #[error(transparent)]
    Backing(#[from] ParseBackingKindError),
    /// The properties of the memory are incompatible.
    #[error("--memory: {0}")]
    Memory(#[from] MemoryError),
    /// No device is named.
    #[error(
        "--vhost-user: the device is missing; name it, as in blk,socket=PATH; the devices are {}",
        DeviceKind::names()
    )]
    NoDevice,
    /// More than one device is named.
    #[error("--vhost-user: it names more than one device; give the option once for each")]
    TwoDevices,
    /// The device has a value.
    #[error("it takes no value")]
    ValueOfDevice,
    /// The device has no socket.
    #[error("--vhost-user: the socket of the back-end is missing; name it, as in socket=PATH")]
    NoSocket,
    /// The device cannot have such a property.
    #[error(transparent)]
    Device(#[from] DeviceConfigError),
    /// A part of the host cache is missing.
    #[error("--cache: {0}")]
    Cache(#[from] CacheConfigError),
    /// The use of the working set is missing.
    #[error("--working-set: choose record, replay, auto or off, as in auto,at=FILE")]
    WorkingSet,
    /// The place of the working set is empty.
    #[error("it is empty; name a file or a URL")]
    Empty,
    /// The fill is none of those that exist.
    #[error("--fill: choose on, off or rate=BYTES, as in rate=100M")]
    Fill,
    /// An option of the fill makes no sense.
    #[error(transparent)]
    FillOption(#[from] FillError),
    /// The serial port has no such destination.
    #[error("--serial: choose tty, file=PATH or off")]
    Serial,
    /// The source is empty.
    #[error("--source: the value is empty; use hot, or name an image")]
    NoSource,
}

/// The parts of an option's value, `key=value,key=value`. A part without `=` is a key with an empty
/// value. As in QEMU, two commas stand for one within a part: `socket=/run/a,,b`.
#[derive(Debug)]
pub struct Parts {
    option: &'static str,
    values: BTreeMap<String, String>,
}

/// Splits a text at its commas, except where two stand for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else {
            parts.last_mut().expect("there is always one").push(c);
        }
    }
    parts
}

impl Parts {
    /// Splits the value of `option`.
    ///
    /// # Errors
    ///
    /// [`ParseError::Twice`]
    pub fn new(option: &'static str, text: &str) -> Result<Self, ParseError> {
        Parts::of(option, None, text)
    }

    /// Splits the value of `option`, whose first part may be the value of `first` alone, as in
    /// `64M,thp=on` for `size=64M,thp=on`.
    ///
    /// # Errors
    ///
    /// [`ParseError::Twice`]
    pub fn with_first(
        option: &'static str,
        first: &'static str,
        text: &str,
    ) -> Result<Self, ParseError> {
        Parts::of(option, Some(first), text)
    }

    fn of(
        option: &'static str,
        mut first: Option<&'static str>,
        text: &str,
    ) -> Result<Self, ParseError> {
        let mut values = BTreeMap::new();
        for part in split(text).into_iter().filter(|part| !part.is_empty()) {
            let (key, value) = match (part.split_once('='), first.take()) {
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
                (None, Some(first)) => (first.to_owned(), part),
                (None, None) => (part, String::new()),
            };
            if values.contains_key(&key) {
                return Err(ParseError::Twice { option, key });
            }
            values.insert(key, value);
        }
        Ok(Parts { option, values })
    }

    /// Takes the value of `key` out of the parts, if it is given.
    ///
    /// # Errors
    ///
    /// [`ParseError::Part`], with the error of `parse`.
    pub fn take<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, ParseError>,
    ) -> Result<Option<T>, ParseError> {
        let Some(value) = self.values.remove(key) else { return Ok(None) };
        parse(&value).map(Some).map_err(|source| ParseError::Part {
            option: self.option,
            key: key.into(),
            value,
            source: Box::new(source),
        })
    }

    /// Refuses the parts that are left. `known` lists all keys of the option.
    ///
    /// # Errors
    ///
    /// [`ParseError::UnknownKey`]
    pub fn end(self, known: &str) -> Result<(), ParseError> {
        match self.values.into_keys().next() {
            None => Ok(()),
            Some(key) => {
                Err(ParseError::UnknownKey { option: self.option, key, known: known.into() })
            }
        }
    }
}

/// Parses a number.
///
/// # Errors
///
/// [`ParseError::Number`]
pub fn parse_number<T: FromStr>(text: &str) -> Result<T, ParseError> {
    text.parse().map_err(|_| ParseError::Number)
}

fn parse_switch(text: &str) -> Result<bool, ParseError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(ParseError::Choice("on or off")),
    }
}

fn parse_backing(name: &str) -> Result<BackingKind, ParseError> {
    Ok(name.parse::<BackingKind>()?)
}

impl FromStr for MemoryConfig {
    type Err = ParseError;

    /// Parses `1G`, `size=1G,backing=hugetlb-2m,reserve=on` or `1G,thp=on`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(text.parse::<RestoreMemory>()?.try_into()?)
    }
}

impl FromStr for RestoreMemory {
    type Err = ParseError;

    /// Parses the same parts, all of which may be left out.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = Parts::with_first("--memory", "size", text)?;
        let memory = RestoreMemory {
            size: parts.take("size", |size| Ok(parse_size(size)?))?,
            backing: parts.take("backing", parse_backing)?,
            reserve: parts.take("reserve", parse_switch)?,
            thp: parts.take("thp", parse_switch)?,
        };
        parts.end("size, backing, reserve and thp")?;
        Ok(memory)
    }
}

impl FromStr for VhostUserConfig {
    type Err = ParseError;

    /// Parses `blk,socket=PATH,queues=N` or `net,socket=PATH,mac=02:00:00:00:00:01`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = Parts::new("--vhost-user", text)?;
        let kind = take_kind(&mut parts)?;
        let socket = parts.take("socket", |path| match path {
            "" => Err(DeviceConfigError::EmptySocket.into()),
            path => Ok(PathBuf::from(path)),
        })?;
        let defaults = VhostUserConfig::new(kind, socket.ok_or(ParseError::NoSocket)?);
        let option = VhostUserConfig {
            queues: parts
                .take("queues", |n| Ok(check_queues(kind, parse_number(n)?)?))?
                .unwrap_or(defaults.queues),
            queue_size: parts
                .take("queue-size", |n| Ok(check_queue_size(parse_number(n)?)?))?
                .unwrap_or(defaults.queue_size),
            lazy: parts.take("lazy", parse_lazy)?.unwrap_or(defaults.lazy),
            id: parts.take("id", |name| Ok(check_name(name)?))?,
            mac: match kind {
                DeviceKind::Net => parts.take("mac", |mac| Ok(parse_mac(mac)?))?,
                _ => None,
            },
            cid: match kind {
                DeviceKind::Vsock => parts.take("cid", |n| Ok(check_cid(parse_number(n)?)?))?,
                _ => None,
            },
            ..defaults
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
fn take_kind(parts: &mut Parts) -> Result<DeviceKind, ParseError> {
    let none = |value: &str| if value.is_empty() { Ok(()) } else { Err(ParseError::ValueOfDevice) };
    let mut found = None;
    for kind in DeviceKind::ALL {
        if parts.take(kind.name(), none)?.is_some() && found.replace(kind).is_some() {
            return Err(ParseError::TwoDevices);
        }
    }
    found.ok_or(ParseError::NoDevice)
}

fn parse_lazy(name: &str) -> Result<Lazy, ParseError> {
    match name {
        "auto" => Ok(Lazy::Auto),
        "postcopy" => Ok(Lazy::Postcopy),
        "fill" => Ok(Lazy::Fill),
        "refuse" => Ok(Lazy::Refuse),
        _ => Err(ParseError::Choice("auto, postcopy, fill or refuse")),
    }
}

impl FromStr for CacheConfig {
    type Err = ParseError;

    /// Parses `DIR,size=BYTES`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = Parts::with_first("--cache", "dir", text)?;
        let dir = parts.take("dir", |dir| Ok(PathBuf::from(dir)))?;
        let size = parts.take("size", |size| Ok(parse_size(size)?))?;
        parts.end("dir, size")?;
        Ok(CacheConfig::checked(dir, size)?)
    }
}

impl FromStr for WorkingSetConfig {
    type Err = ParseError;

    /// Parses `record`, `replay`, `auto` or `off`, with `,at=FILE` or `,at=URL`, and `,seconds=N`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = Parts::with_first("--working-set", "mode", text)?;
        let mode = parts.take("mode", |mode| match mode {
            "record" => Ok(WorkingSetMode::Record),
            "replay" => Ok(WorkingSetMode::Replay),
            "auto" => Ok(WorkingSetMode::Auto),
            "off" => Ok(WorkingSetMode::Off),
            _ => Err(ParseError::Choice("record, replay, auto or off")),
        })?;
        let at = parts.take("at", |at| match at {
            "" => Err(ParseError::Empty),
            at => Ok(PathBuf::from(at).into()),
        })?;
        let seconds = parts.take("seconds", parse_number)?.unwrap_or(DEFAULT_SECONDS);
        parts.end("at, seconds")?;
        Ok(WorkingSetConfig { mode: mode.ok_or(ParseError::WorkingSet)?, at, seconds })
    }
}

impl FromStr for FillConfig {
    type Err = ParseError;

    /// Parses `off`, or `on` or `rate=BYTES/s` with other parts of [`FillOptions`].
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text == "off" {
            return Ok(FillConfig::Off);
        }
        let mut parts = Parts::new("--fill", text)?;
        let on = |value: &str| value.is_empty().then_some(()).ok_or(ParseError::Choice("on alone"));
        let rate = match (parts.take("on", on)?, parts.take("rate", parse_rate)?) {
            (_, Some(rate)) => rate,
            (Some(()), None) => FillRate::Unlimited,
            (None, None) => return Err(ParseError::Fill),
        };
        let default = FillOptions::default();
        let options = FillOptions {
            rate,
            in_flight: parts.take("in-flight", parse_in_flight)?.unwrap_or(default.in_flight),
            chunk: parts
                .take("chunk", |text| Ok(check_chunk(parse_size(text)?)?))?
                .unwrap_or(default.chunk),
            order: parts.take("order", |name| Ok(parse_order(name)?))?.unwrap_or(default.order),
        };
        parts.end("on, off, rate, in-flight, chunk, order")?;
        Ok(FillConfig::On(options))
    }
}

fn parse_rate(text: &str) -> Result<FillRate, ParseError> {
    Ok(check_rate(parse_size(text.strip_suffix("/s").unwrap_or(text))?)?)
}

fn parse_in_flight(text: &str) -> Result<InFlight, ParseError> {
    if text == "auto" { Ok(InFlight::default()) } else { Ok(InFlight::Fixed(parse_size(text)?)) }
}

impl FromStr for SerialConfig {
    type Err = ParseError;

    /// Parses `tty`, `file=PATH` or `off`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "tty" => Ok(SerialConfig::Terminal),
            "off" => Ok(SerialConfig::Off),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
                _ => Err(ParseError::Serial),
            },
        }
    }
}

impl FromStr for Access {
    type Err = ParseError;

    fn from_str(name: &str) -> Result<Self, ParseError> {
        let found = [Access::Read, Access::Write].into_iter().find(|access| access.name() == name);
        found.ok_or(ParseError::Choice("read or write"))
    }
}

impl FromStr for Order {
    type Err = ParseError;

    fn from_str(name: &str) -> Result<Self, ParseError> {
        let all = [Order::Sequential, Order::Random, Order::Strided];
        let found = all.into_iter().find(|order| order.name() == name);
        found.ok_or(ParseError::Choice("sequential, random or strided"))
    }
}

impl FromStr for SourceOption {
    type Err = ParseError;

    /// Parses `hot`, or the path of an image.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "" => Err(ParseError::NoSource),
            "hot" => Ok(SourceOption::Hot),
            path => Ok(SourceOption::File(path.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory() {
        let option: MemoryConfig = "size=1G,backing=hugetlb-2m,reserve=off".parse().unwrap();
        assert_eq!((option.size, option.backing), (1 << 30, BackingKind::Hugetlb2M));
        assert!(!option.reserve && !option.thp);
        assert!("size=1G,thp=on".parse::<MemoryConfig>().unwrap().thp);
        assert!("1G,thp=on".parse::<MemoryConfig>().unwrap().thp);
        assert_eq!("64M".parse::<MemoryConfig>().unwrap().size, 64 << 20);
        for text in [
            "",
            "1Q",
            "1G,2G",
            "1G,size=2G",
            "thp=on,1G",
            "size=0",
            "size=3M,backing=hugetlb-2m",
            "size=1G,size=2G",
            "size=x",
            "size=1G,backing=tmpfs",
            "size=1G,a=b",
            "size=1G,backing=hugetlb-2m,thp=on",
        ] {
            let error = text.parse::<MemoryConfig>().unwrap_err().to_string();
            assert!(error.starts_with("--memory"), "{text}: {error}");
        }
    }

    #[test]
    fn vhost_user() {
        let option: VhostUserConfig = "blk,socket=/a/b,queues=2".parse().unwrap();
        let expected =
            VhostUserConfig { queues: 2, ..VhostUserConfig::new(DeviceKind::Blk, "/a/b") };
        assert_eq!(option, expected);
        let option: VhostUserConfig =
            "socket=s,net,mac=02:00:00:00:aB:01,lazy=fill,id=lan,queue-size=64".parse().unwrap();
        assert_eq!((option.kind, option.queues, option.queue_size), (DeviceKind::Net, 2, 64));
        assert_eq!((option.mac, option.lazy), (Some([2, 0, 0, 0, 0xab, 1]), Lazy::Fill));
        assert_eq!(option.id.as_deref(), Some("lan"));
        let option: VhostUserConfig = "blk,socket=/a,,b,,,,=c,".parse().unwrap();
        assert_eq!(option.socket, PathBuf::from("/a,b,,=c"));
        let option: VhostUserConfig = "vsock,socket=s,cid=3".parse().unwrap();
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
            "blk,socket=x,lazy=never",
            "blk,socket=x,id=a b",
            "blk,socket=x,mac=02:00:00:00:00:01",
            "net,socket=x,mac=02:00:00:00:00",
            "net,socket=x,mac=01:00:00:00:00:01",
            "net,socket=x,mac=+2:00:00:00:00:01",
            "vsock,socket=x,cid=2",
            "blk,socket=x,z=1",
        ] {
            let error = text.parse::<VhostUserConfig>().unwrap_err().to_string();
            assert!(error.starts_with("--vhost-user: "), "{text}: {error}");
        }
    }

    #[test]
    fn working_sets() {
        let set = |text: &str| text.parse::<WorkingSetConfig>();
        let plain = WorkingSetConfig { mode: WorkingSetMode::Auto, at: None, seconds: 30 };
        assert_eq!(set("auto"), Ok(plain.clone()));
        let at = Some("s3://bucket/a,b".parse().unwrap());
        let full = WorkingSetConfig { mode: WorkingSetMode::Record, at, seconds: 5 };
        assert_eq!(set("record,at=s3://bucket/a,,b,seconds=5"), Ok(full));
        for (text, words) in [
            ("", "choose record, replay, auto or off"),
            ("at=/a", "choose record, replay, auto or off"),
            ("on", "--working-set: mode=on: choose record, replay, auto or off"),
            ("auto,at=", "--working-set: at=: it is empty"),
            ("auto,seconds=x", "--working-set: seconds=x: it is not a number"),
            ("auto,for=3", "--working-set: unknown key 'for'; it takes at, seconds"),
        ] {
            let error = set(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn caches() {
        let cache = |dir: &str| CacheConfig { dir: dir.into(), size: 10 << 30 };
        for (text, dir) in [
            ("/c,size=10G", "/c"),
            ("size=10G,dir=/c", "/c"),
            ("/a,,b,size=10G", "/a,b"),
            ("dir=/a=b,size=10G", "/a=b"),
        ] {
            assert_eq!(text.parse::<CacheConfig>().unwrap(), cache(dir), "{text}");
        }
        for (text, words) in [
            ("/c", "size of the cache is missing"),
            ("size=1G", "directory of the cache is missing"),
            ("", "directory of the cache is missing"),
            ("dir=,size=1G", "directory of the cache is missing"),
            ("/c,size=1Q", "--cache: size=1Q: '1Q' is not a size"),
            ("/c,size=1G,mode=1", "--cache: unknown key 'mode'; it takes dir, size"),
        ] {
            let error = text.parse::<CacheConfig>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn fill() {
        assert_eq!("off".parse::<FillConfig>().unwrap(), FillConfig::Off);
        let rate = FillConfig::On(FillRate::BytesPerSecond(1 << 20).into());
        assert_eq!("rate=1M/s".parse::<FillConfig>().unwrap(), rate);
        assert_eq!("rate=1M".parse::<FillConfig>().unwrap(), rate);
        let text = "on,in-flight=8M,chunk=1M,order=near-fault";
        let options = FillOptions {
            rate: FillRate::Unlimited,
            in_flight: InFlight::Fixed(8 << 20),
            chunk: 1 << 20,
            order: demand_memory::FillOrder::NearLastFault,
        };
        assert_eq!(text.parse::<FillConfig>().unwrap(), FillConfig::On(options));
        for text in [
            "",
            "yes",
            "rate=0",
            "rate=",
            "off,chunk=1M",
            "chunk=1M",
            "on=1",
            "on,chunk=4095",
            "on,in-flight=some",
            "on,order=random",
            "on,threads=4",
        ] {
            let error = text.parse::<FillConfig>().unwrap_err().to_string();
            assert!(error.starts_with("--fill: "), "{text}: {error}");
        }
    }

    #[test]
    fn serial() {
        assert_eq!("tty".parse::<SerialConfig>().unwrap(), SerialConfig::Terminal);
        let file = SerialConfig::File("a,b".into());
        assert_eq!("file=a,b".parse::<SerialConfig>().unwrap(), file);
        for text in ["", "file=", "on"] {
            let error = text.parse::<SerialConfig>().unwrap_err().to_string();
            assert!(error.starts_with("--serial"), "{text}: {error}");
        }
    }
}
