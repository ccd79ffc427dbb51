// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU as the front-end: its firmware boots from the device, and the boot sector reads and writes.
//! The tests print SKIPPED and pass where QEMU is not installed.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use common::*;

/// Reads sector 1 and writes it to sector 3 through the BIOS, writes its first byte and "!" to the
/// debug console, and exits.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x31, 0xc0,                         // xor ax, ax
    0x8e, 0xd8,                         // mov ds, ax
    0xbe, 0x60, 0x7c,                   // mov si, 0x7c60
    0xb4, 0x42, 0xcd, 0x13,             // mov ah, 0x42; int 0x13
    0xa0, 0x00, 0x7e,                   // mov al, [0x7e00]
    0xe6, 0xe9,                         // out 0xe9, al
    0xc7, 0x06, 0x68, 0x7c, 0x03, 0x00, // mov word [0x7c68], 3
    0xb8, 0x00, 0x43, 0xcd, 0x13,       // mov ax, 0x4300; int 0x13
    0xb0, b'!', 0xe6, 0xe9,             // mov al, '!'; out 0xe9, al
    0xb0, 0x10, 0xe6, 0xf4,             // mov al, 0x10; out 0xf4, al
    0xf4, 0xeb, 0xfd,                   // hlt; jmp $-1
];
/// The BIOS's disk address packet, at 0x7c60: one sector, to 0x7e00, from sector 1.
const PACKET: [u8; 16] = [16, 0, 1, 0, 0x00, 0x7e, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Runs QEMU on the daemon's socket until it ends. Returns `None` if it is not installed.
fn qemu(daemon: &Daemon, accelerator: &str, args: &[&str]) -> Option<ExitStatus> {
    let qemu = Command::new("qemu-system-x86_64")
        .current_dir(daemon.dir.path())
        .args(["-nodefaults", "-display", "none", "-m", "192M"])
        .args(["-machine", "q35,memory-backend=m", "-accel", accelerator])
        .args(["-object", "memory-backend-memfd,id=m,size=192M,share=on"])
        .args(["-chardev", "socket,id=c,path=socket"])
        .args(args)
        .stdin(Stdio::null())
        .spawn();
    let mut qemu = match qemu {
        Ok(qemu) => qemu,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    // An emulated machine on a busy host needs this long.
    let start = Instant::now();
    loop {
        if let Some(status) = qemu.try_wait().unwrap() {
            return Some(status);
        }
        if start.elapsed() > 18 * PATIENCE {
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            let console = fs::read_to_string(daemon.dir.path().join("console"));
            panic!("the guest does not finish: {console:?}");
        }
        thread::sleep(PATIENCE / 200);
    }
}

#[test]
fn boots_under_qemu() {
    let mut daemon = Daemon::start(4096, &["--num-queues", "2", "--once"]);
    let mut disk = daemon.disk();
    disk[..CODE.len()].copy_from_slice(CODE);
    disk[0x60..0x70].copy_from_slice(&PACKET);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..1024].fill(b'Z');
    fs::write(daemon.dir.path().join("disk"), &disk).unwrap();

    let Some(status) = qemu(
        &daemon,
        "tcg",
        &[
            "-device",
            "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=0",
            "-debugcon",
            "file:console",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
        ],
    ) else {
        return;
    };
    assert_eq!(status.code(), Some(0x10 << 1 | 1));
    assert!(daemon.wait().success());
    assert_eq!(fs::read_to_string(daemon.dir.path().join("console")).unwrap(), "Z!");
    assert_eq!(daemon.disk()[3 * 512..4 * 512], [b'Z'; 512]);
    assert_eq!(daemon.stats()["writes"], 1);
    assert_eq!(daemon.stderr(), "");
}

/// QEMU's own words for a closed connection; it does not wait.
#[test]
fn second_qemu_ends_at_once() {
    let daemon = Daemon::start(4096, &[]);
    let mut first = Guest::connect(&daemon.socket(), 1);
    let start = Instant::now();
    let device = ["-device", "vhost-user-blk-pci,chardev=c"];
    let Some(status) = qemu(&daemon, "tcg", &device) else {
        return;
    };
    assert_eq!(status.code(), Some(1));
    // To start QEMU takes seconds on a busy machine.
    assert!(start.elapsed() < 3 * PATIENCE, "{:?}", start.elapsed());
    until("the message", || daemon.stderr().contains("busy with front-end (process "));
    assert_eq!(first.request(0, T_IN, 1, DATA, 512), (OK, 513));
}

/// The init script of the Linux guest; its output goes to the console.
const INIT: &str = r#"#!/bin/busybox sh
b() { /bin/busybox "$@"; }
b mkdir -p /dev /proc /sys /mnt
b mount -t devtmpfs dev /dev
b mount -t sysfs sys /sys
b mount -t proc proc /proc
q=/sys/block/vda/queue
for f in $q/logical_block_size $q/physical_block_size $q/discard_max_bytes \
    $q/write_zeroes_max_bytes $q/write_cache /sys/block/vda/serial /sys/block/vda/size; do
    echo "${f##*/}=$(b cat $f)"
done
# Three patterns, and a hole in the middle one.
b tr '\0' A < /dev/zero | b dd of=/dev/vda bs=1M count=12 iflag=fullblock conv=fsync
b blkdiscard -o 4194304 -l 4194304 /dev/vda || echo "blkdiscard failed"
# A file system that is made, filled by four at once, read back, trimmed.
b dd if=/dev/vda of=/dev/null bs=64k
b mke2fs -b 4096 /dev/vda > /dev/null
b mount -t ext4 -o discard /dev/vda /mnt || echo "mount failed"
for i in 1 2 3 4; do
    b dd if=/dev/urandom of=/mnt/$i bs=64k count=32 conv=fsync &
done
wait
b sha1sum /mnt/? > /sums
b sync
echo 3 > /proc/sys/vm/drop_caches
b sha1sum -c /sums
b rm /mnt/1 /mnt/2
b fstrim /mnt || echo "fstrim failed"
b umount /mnt
echo "write through" > $q/write_cache && echo "write_cache=$(b cat $q/write_cache)"
b dd if=/dev/zero of=/dev/vda bs=4k count=16 seek=2560 conv=fsync
echo "the end"
b sync
b reboot -f
"#;

/// Returns the newest kernel in the lab's cache, which serves as the guest's kernel.
fn kernel() -> Option<PathBuf> {
    // On the host the variable may name a series instead.
    let image = std::env::var_os("LAB_KERNEL").filter(|kernel| Path::new(kernel).is_file());
    if let Some(kernel) = image {
        return Some(kernel.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let kernels = fs::read_dir(cache.join("demand-paging/kernel")).ok()?.flatten();
    let kernels = kernels.map(|entry| entry.path().join("bzImage")).filter(|path| path.exists());
    kernels.max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
}

/// Builds an archive in the format that Linux unpacks at boot ("newc").
fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = vec![];
    for (i, (name, mode, content)) in files.iter().chain([&("TRAILER!!!", 0, &[][..])]).enumerate()
    {
        let fields = [i + 1, *mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0];
        archive.extend_from_slice(b"070701");
        for field in fields.into_iter().chain([name.len() + 1, 0]) {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

#[test]
fn a_linux_guest_under_qemu() {
    let Some(kernel) = kernel() else {
        eprintln!("SKIPPED: no kernel for a guest; `cargo lab kernel` builds one");
        return;
    };
    let busybox = match fs::read("/bin/busybox") {
        Ok(busybox) => busybox,
        Err(error) => {
            eprintln!("SKIPPED: /bin/busybox: {error}; busybox-static has it");
            return;
        }
    };
    let args = ["--num-queues", "2", "--block-size", "4096", "--serial", "linux-1", "--once"];
    let mut daemon = Daemon::start(32 << 11, &args);
    let files = [
        ("bin", 0o40755, &[][..]),
        ("bin/busybox", 0o100755, &busybox),
        ("init", 0o100755, INIT.as_bytes()),
        ("dev", 0o40755, &[]),
    ];
    fs::write(daemon.dir.path().join("initrd"), archive(&files)).unwrap();
    let Some(status) = qemu(
        &daemon,
        // The lab is slow enough already, and its KVM is known to work.
        if std::env::var_os("LAB").is_some() { "kvm" } else { "tcg" },
        &[
            "-smp",
            "2",
            "-no-reboot",
            "-kernel",
            kernel.to_str().unwrap(),
            "-initrd",
            "initrd",
            "-append",
            "console=ttyS0 quiet panic=-1",
            "-serial",
            "file:console",
            "-device",
            "vhost-user-blk-pci,chardev=c,num-queues=2",
        ],
    ) else {
        return;
    };
    let console = fs::read(daemon.dir.path().join("console")).unwrap();
    let console = String::from_utf8_lossy(&console).replace('\r', "");
    assert!(status.success(), "{console}");
    assert!(daemon.wait().success());
    for line in [
        "logical_block_size=4096",
        "physical_block_size=4096",
        "discard_max_bytes=1073741824",
        "write_zeroes_max_bytes=67108864",
        "write_cache=write back",
        "serial=linux-1",
        "size=65536",
        "/mnt/1: OK",
        "/mnt/4: OK",
        "write_cache=write through",
        "the end",
    ] {
        assert!(console.lines().any(|l| l == line), "no {line:?} in:\n{console}");
    }
    for word in ["failed", "error", "FAILED"] {
        assert!(!console.contains(word), "{word} in:\n{console}");
    }
    let stats = daemon.stats();
    for (counter, least) in
        [("reads", 20), ("writes", 20), ("flushes", 1), ("discards", 2), ("get_ids", 1)]
    {
        assert!(stats[counter].as_u64().unwrap() >= least, "{counter}: {stats}");
    }
    assert!(stats["bytes_discarded"].as_u64().unwrap() >= 4 << 20, "{stats}");
    for counter in ["io_errors", "unsupported", "dropped", "abandoned"] {
        assert_eq!(stats[counter], 0, "{stats}");
    }
    assert!(daemon.disk()[10 << 20..(10 << 20) + 65536].iter().all(|byte| *byte == 0));
    assert_eq!(daemon.stderr(), "");
}
