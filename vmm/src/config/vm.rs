// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a VM as one document: the body of the API's `vm.create` and `vm.restore`.

use std::io;
use std::path::{Path, PathBuf};

use demand_kvm::EngineChoice;
use demand_paging::Lazy;
use serde::{Deserialize, Serialize};

use crate::config::device::VhostUserConfig;
use crate::config::json::text;
use crate::config::source::SnapshotPlace;
use crate::config::{
    CacheConfig, ClockConfig, FetchAroundConfig, FillConfig, MemoryConfig, OnPanic, RestoreMemory,
    SerialConfig, WorkingSetConfig,
};

/// The kernel's command line if none is given.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

fn default_cmdline() -> String {
    DEFAULT_CMDLINE.into()
}

fn default_cpus() -> u32 {
    1
}

/// A VM that boots a Linux kernel.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::vm::VmConfig;
///
/// let config: VmConfig = serde_json::from_str(
///     r#"{
///         "memory": {"size": "1G", "backing": "hugetlb-2m"},
///         "cpus": 2,
///         "kernel": "/boot/vmlinuz",
///         "devices": [{"type": "blk", "socket": "/run/blk.sock"}],
///         "serial": {"file": "/var/log/guest.log"}
///     }"#,
/// )
/// .unwrap();
/// assert_eq!((config.memory.size, config.cpus), (1 << 30, 2));
/// assert_eq!(config.cmdline, "console=ttyS0");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Size and backing of the memory.
    pub memory: MemoryConfig,
    /// Number of vCPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// The Linux kernel: a bzImage, or an ELF vmlinux with a PVH entry.
    pub kernel: PathBuf,
    /// Initramfs of the Linux kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Command line of the Linux kernel.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// The devices, in the order in which the guest finds them.
    #[serde(default)]
    pub devices: Vec<VhostUserConfig>,
    /// The destination of the serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The action when the guest's kernel panics.
    #[serde(default)]
    pub on_panic: OnPanic,
}

impl VmConfig {
    /// Returns all paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.boot_files().chain(guest_paths(&self.devices, &self.serial))
    }

    /// Returns the files that the guest boots from.
    pub(crate) fn boot_files(&self) -> impl Iterator<Item = &Path> {
        [Some(&*self.kernel), self.initramfs.as_deref()].into_iter().flatten()
    }

    /// Returns the configuration with all paths made absolute, as the API wants them.
    ///
    /// # Errors
    ///
    /// If the working directory is unknown, or a path is empty.
    pub(crate) fn absolute(mut self) -> io::Result<Self> {
        let files = [Some(&mut self.kernel), self.initramfs.as_mut()];
        let guest = guest_paths_mut(&mut self.devices, &mut self.serial);
        make_absolute(files.into_iter().flatten().chain(guest))?;
        Ok(self)
    }
}

fn make_absolute<'a>(paths: impl Iterator<Item = &'a mut PathBuf>) -> io::Result<()> {
    for path in paths {
        *path = std::path::absolute(&*path)?;
    }
    Ok(())
}

fn guest_paths_mut<'a>(
    devices: &'a mut [VhostUserConfig],
    serial: &'a mut SerialConfig,
) -> impl Iterator<Item = &'a mut PathBuf> {
    let serial = match serial {
        SerialConfig::File(path) => Some(path),
        SerialConfig::Terminal | SerialConfig::Off => None,
    };
    devices.iter_mut().map(|device| &mut device.socket).chain(serial)
}

fn guest_paths<'a>(
    devices: &'a [VhostUserConfig],
    serial: &'a SerialConfig,
) -> impl Iterator<Item = &'a Path> {
    let serial = match serial {
        SerialConfig::File(path) => Some(&**path),
        SerialConfig::Terminal | SerialConfig::Off => None,
    };
    devices.iter().map(|device| &*device.socket).chain(serial)
}

/// A VM that continues from a snapshot.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::vm::RestoreConfig;
///
/// let config: RestoreConfig = serde_json::from_str(
///     r#"{"source": "/snapshots/a", "memory": {"backing": "shmem"}, "fill": {"rate": "64M"}}"#,
/// )
/// .unwrap();
/// assert_eq!(config.cpus, None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Directory or URL of the snapshot.
    pub source: SnapshotPlace,
    /// Further places of the same snapshot: what one fails to deliver comes from another, and
    /// earlier ones are preferred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_sources: Vec<SnapshotPlace>,
    /// The directory in which this host's VMs share what they read of a snapshot that was pushed to
    /// a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// The parts of a snapshot that was pushed to a store that are fetched beside one that a fault
    /// needs.
    #[serde(default)]
    pub fetch_around: FetchAroundConfig,
    /// The properties of the memory that differ from the snapshot's.
    #[serde(default)]
    pub memory: RestoreMemory,
    /// Number of vCPUs that the snapshot must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// The back-ends of the snapshot's devices, in the same order.
    #[serde(default)]
    pub devices: Vec<VhostUserConfig>,
    /// The destination of the serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The action when the guest's kernel panics.
    #[serde(default)]
    pub on_panic: OnPanic,
    /// How vCPU accesses to missing pages are trapped.
    #[serde(default, with = "text")]
    pub engine: EngineChoice,
    /// Whether the guest runs before its memory has arrived.
    #[serde(default, with = "text")]
    pub lazy: Lazy,
    /// How long the source may fail, or not answer, before the VM is paused, in seconds; `None`:
    /// without limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_limit_s: Option<u64>,
    /// Background fill.
    #[serde(default)]
    pub fill: FillConfig,
    /// The working set; `None`: it is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetConfig>,
    /// The point from which the guest's clocks continue.
    #[serde(default)]
    pub clock: ClockConfig,
    /// Whether the whole memory image is read and checked before the guest runs.
    #[serde(default)]
    pub verify: bool,
}

impl RestoreConfig {
    /// Returns all paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let cache = self.cache.iter().map(|cache| &*cache.dir);
        let rest = cache.chain(guest_paths(&self.devices, &self.serial)).map(Path::to_path_buf);
        let sources = [&self.source].into_iter().chain(&self.other_sources);
        let working_set = self.working_set.iter().filter_map(|set| set.at.as_ref());
        sources.chain(working_set).flat_map(SnapshotPlace::paths).chain(rest)
    }

    /// Returns the configuration with all paths made absolute, as the API wants them.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::absolute`].
    pub(crate) fn absolute(mut self) -> io::Result<Self> {
        let guest = guest_paths_mut(&mut self.devices, &mut self.serial);
        let cache = self.cache.iter_mut().map(|cache| &mut cache.dir);
        make_absolute(cache.chain(guest))?;
        self.source.make_absolute()?;
        let working_set = self.working_set.iter_mut().filter_map(|set| set.at.as_mut());
        working_set.into_iter().try_for_each(SnapshotPlace::make_absolute)?;
        self.other_sources.iter_mut().try_for_each(SnapshotPlace::make_absolute)?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demand_memory::{BackingKind, FillRate};
    use serde_json::{Value, from_value, json, to_value};

    fn boot(fields: Value) -> Result<VmConfig, String> {
        let mut config = json!({"memory": {"size": "64M"}, "kernel": "/k"});
        for (name, value) in fields.as_object().unwrap() {
            config[name] = value.clone();
        }
        from_value(config).map_err(|error| error.to_string())
    }

    fn restore(fields: Value) -> Result<RestoreConfig, String> {
        let mut config = json!({"source": "/s"});
        for (name, value) in fields.as_object().unwrap() {
            config[name] = value.clone();
        }
        from_value(config).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_equal_the_command_line_s() {
        let config = boot(json!({})).unwrap();
        assert_eq!(config.memory, "size=64M".parse().unwrap());
        assert_eq!((config.cpus, &*config.cmdline), (1, DEFAULT_CMDLINE));
        assert_eq!((config.serial, config.on_panic), (SerialConfig::Terminal, OnPanic::Ignore));
        let config = restore(json!({})).unwrap();
        assert_eq!((config.engine, config.fill), (EngineChoice::Auto, "on".parse().unwrap()));
        assert_eq!((config.memory, config.verify), (RestoreMemory::default(), false));
    }

    #[test]
    fn values_survive_a_round_trip() {
        let config = boot(json!({
            "memory": {"size": 1 << 30, "backing": "hugetlb-2m", "reserve": false},
            "devices": [
                {"type": "net", "socket": "/n", "mac": "02:00:00:00:aB:01", "id": "lan"},
                {"type": "vsock", "socket": "/v", "cid": 3, "lazy": "fill"},
                {"type": "blk", "socket": "/b", "queues": 2, "queue_size": 64},
            ],
            "serial": {"file": "/log"},
            "on_panic": "reset",
        }))
        .unwrap();
        assert_eq!(config.memory.backing, BackingKind::Hugetlb2M);
        assert_eq!(config.devices[2].queues, 2);
        assert_eq!(config, from_value(to_value(&config).unwrap()).unwrap());
        let config = restore(json!({
            "memory": {"size": "1G", "thp": true}, "cpus": 2, "engine": "uffd", "clock": "host",
            "source_limit_s": 5, "fill": {"rate": "1M"}, "serial": "off", "verify": true,
            "cache": {"dir": "/c", "size": "1G"}, "fetch_around": "1M",
            "other_sources": ["/t", "https://host/vm7"],
            "working_set": {"mode": "auto", "at": "/set", "seconds": 5},
        }))
        .unwrap();
        assert_eq!(config.fill, FillConfig::On(FillRate::BytesPerSecond(1 << 20).into()));
        assert_eq!(config, from_value(to_value(&config).unwrap()).unwrap());
        let full = restore(json!({"fill": "off"})).unwrap();
        assert_eq!(full, from_value(to_value(&full).unwrap()).unwrap());
    }

    #[test]
    fn impossible_values_are_refused() {
        let blk = |fields: Value| {
            let mut device = json!({"type": "blk", "socket": "/b"});
            device.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            json!({"devices": [device]})
        };
        for (fields, words) in [
            (json!({"memory": {}}), "size"),
            (json!({"memory": {"size": "1Q"}}), "is not a size"),
            (json!({"memory": {"size": -1}}), "a number of bytes"),
            (json!({"memory": {"size": "3M", "backing": "hugetlb-2m"}}), "not a multiple"),
            (json!({"memory": {"size": "2M", "backing": "hugetlb-2m", "thp": true}}), "shmem only"),
            (json!({"memory": {"size": "1G", "backing": "tmpfs"}}), "tmpfs"),
            (json!({"memory": {"size": "1G", "color": 1}}), "color"),
            (json!({"cpus": -1}), "-1"),
            (json!({"colour": 1}), "colour"),
            (json!({"serial": "loud"}), "loud"),
            (json!({"on_panic": "run"}), "run"),
            (blk(json!({"queues": 0})), "at least one"),
            (blk(json!({"queues": 257})), "at most 256"),
            (blk(json!({"queue_size": 100})), "power of two"),
            (blk(json!({"id": "a b"})), "a name has"),
            (blk(json!({"socket": ""})), "path is empty"),
            (blk(json!({"mac": "02:00:00:00:00:01"})), "has no mac"),
            (blk(json!({"cid": 3})), "has no cid"),
            (blk(json!({"type": "net", "mac": "01:00:00:00:00:01"})), "unicast"),
            (blk(json!({"type": "net", "mac": "02"})), "must look like"),
            (blk(json!({"type": "net", "queues": 4})), "has 2 queues"),
            (blk(json!({"type": "vsock", "cid": 2})), "CID"),
            (blk(json!({"type": "fs"})), "fs"),
        ] {
            let error = boot(fields.clone()).unwrap_err();
            assert!(error.contains(words), "{fields}: {error}");
        }
        for (fields, words) in [
            (json!({"engine": "magic"}), "magic"),
            (json!({"fill": "yes"}), "yes"),
            (json!({"fill": {"rate": 0}}), "fills nothing"),
            (json!({"clock": "stop"}), "stop"),
            (json!({"kernel": "/k"}), "kernel"),
        ] {
            let error = restore(fields.clone()).unwrap_err();
            assert!(error.contains(words), "{fields}: {error}");
        }
    }
}
