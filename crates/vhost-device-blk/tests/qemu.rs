// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU as the front-end: its firmware boots from the device, and the boot sector reads and writes.
//! Says so and passes where QEMU is not installed.

mod common;

use std::fs;
use std::io::ErrorKind;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use common::*;

/// Reads sector 1 and writes it to sector 3 through the BIOS, puts its first byte and "!" on the
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

#[test]
fn boots_under_qemu() {
    let mut daemon = Daemon::start(4096, &["--num-queues", "2", "--once"]);
    let mut disk = daemon.disk();
    disk[..CODE.len()].copy_from_slice(CODE);
    disk[0x60..0x70].copy_from_slice(&PACKET);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..1024].fill(b'Z');
    fs::write(daemon.dir.path().join("disk"), &disk).unwrap();

    let qemu = Command::new("qemu-system-x86_64")
        .current_dir(daemon.dir.path())
        .args(["-nodefaults", "-display", "none", "-m", "64M"])
        .args(["-machine", "q35,accel=tcg,memory-backend=m"])
        .args(["-object", "memory-backend-memfd,id=m,size=64M,share=on"])
        .args(["-chardev", "socket,id=c,path=socket"])
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=0"])
        .args(["-debugcon", "file:console"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(Stdio::null())
        .spawn();
    let mut qemu = match qemu {
        Ok(qemu) => qemu,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    // An emulated machine on a busy host takes its time.
    let start = Instant::now();
    let status = loop {
        if let Some(status) = qemu.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > 6 * PATIENCE {
            qemu.kill().unwrap();
            panic!("the guest does not finish");
        }
        thread::sleep(PATIENCE / 200);
    };
    assert_eq!(status.code(), Some(0x10 << 1 | 1));
    assert!(daemon.wait().success());
    assert_eq!(fs::read_to_string(daemon.dir.path().join("console")).unwrap(), "Z!");
    assert_eq!(daemon.disk()[3 * 512..4 * 512], [b'Z'; 512]);
    assert_eq!(daemon.stats()["writes"], 1);
    assert_eq!(daemon.stderr(), "");
}
