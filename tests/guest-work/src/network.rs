// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network card: configures it with an address, and checks that it received no damaged packet.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fd::AsFd;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::net::{AddressFamily, SocketType, socket};

use crate::setup;

/// Name of the card.
const CARD: &str = "eth0";
/// Requests, of netdevice(7).
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFFLAGS: Opcode = 0x8914;
const IFF_UP: u16 = 1;
/// The counters of damaged packets, by line of /proc/net/snmp.
const DAMAGED: [(&str, &[&str]); 2] =
    [("Ip:", &["InHdrErrors", "InDiscards"]), ("Icmp:", &["InErrors", "InCsumErrors"])];

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

impl Request {
    fn new(value: &[u8]) -> Self {
        let mut this = Self { name: [0; 16], value: [0; 24] };
        this.name[..CARD.len()].copy_from_slice(CARD.as_bytes());
        this.value[..value.len()].copy_from_slice(value);
        this
    }
}

/// Waits for the card, gives it an address and turns it on. Its peers follow from the class of the
/// address.
pub(crate) fn up(address: Ipv4Addr) -> Result<()> {
    setup::await_path(&statistics())?;
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // `struct sockaddr_in`: the family, no port, the address.
    let mut place = [0; 16];
    place[..2].copy_from_slice(&AddressFamily::INET.as_raw().to_ne_bytes());
    place[4..8].copy_from_slice(&address.octets());
    ask::<SIOCSIFADDR>(&any, &place).with_context(|| format!("{CARD} did not become {address}"))?;
    ask::<SIOCSIFFLAGS>(&any, &IFF_UP.to_ne_bytes())
        .with_context(|| format!("{CARD} could not be turned on"))
}

fn ask<const REQUEST: Opcode>(socket: impl AsFd, value: &[u8]) -> rustix::io::Result<()> {
    let mut request = Request::new(value);
    // SAFETY: both requests take a `struct ifreq`, which has 40 bytes and for which any value is
    // valid.
    unsafe { ioctl(socket, Updater::<REQUEST, _>::new(&mut request)) }
}

fn statistics() -> PathBuf {
    Path::new("/sys/class/net").join(CARD).join("statistics")
}

/// Checks that the kernel has received no damaged packet. It drops those, so they would seem lost.
pub(crate) fn no_errors() -> Result<()> {
    for entry in fs::read_dir(statistics())? {
        let path = entry?.path();
        let count = fs::read_to_string(&path)?;
        let bad = path.to_string_lossy().ends_with("_errors") && count.trim() != "0";
        ensure!(!bad, "{} counts {}", path.display(), count.trim());
    }
    let counts = fs::read_to_string("/proc/net/snmp")?;
    for (protocol, names) in DAMAGED {
        for name in names {
            let count = counter(&counts, protocol, name)
                .with_context(|| format!("the kernel does not count {name} of {protocol}"))?;
            ensure!(count == 0, "the kernel counts {count} {name} of {protocol}");
        }
    }
    Ok(())
}

/// Returns a counter of /proc/net/snmp, which has for each protocol a line of names, then a line of
/// counts.
fn counter(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with(protocol));
    let (names, counts) = (lines.next()?, lines.next()?);
    let mut both = names.split(' ').zip(counts.split(' '));
    both.find(|(found, _)| *found == name)?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = fs::read_to_string("/proc/net/snmp").expect("every Linux has it");
        for (protocol, names) in DAMAGED {
            for name in names {
                assert!(counter(&text, protocol, name).is_some(), "{protocol} {name}");
            }
        }
        let text = "Ip: Forwarding InDiscards\nIp: 1 7\nIcmp: InMsgs InErrors\nIcmp: 3 4\n";
        assert_eq!(counter(text, "Ip:", "InDiscards"), Some(7));
        assert_eq!(counter(text, "Icmp:", "InErrors"), Some(4));
        assert_eq!(counter(text, "Icmp:", "InDiscards"), None);
    }

    #[test]
    fn request_has_the_kernels_layout() {
        assert_eq!(size_of::<Request>(), 40);
        let request = Request::new(&[2, 0]);
        assert_eq!((&request.name[..5], request.value[0]), (&b"eth0\0"[..], 2));
    }
}
