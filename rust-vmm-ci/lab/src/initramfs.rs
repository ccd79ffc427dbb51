// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab's initramfs: busybox, this binary as the agent, the kernel's modules if it has any, and
//! the script that loads them, mounts the host's root and starts the agent.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::cpio::{Archive, DIRECTORY, PROGRAM};
use crate::modules::{self, Module};
use crate::protocol::ROOT_TAG;

/// Paths of the binary of Debian's busybox-static, with and without merged /usr.
const BUSYBOX: [&str; 2] = ["/usr/bin/busybox", "/bin/busybox"];

/// Packs the initramfs into an anonymous file, which QEMU reads through its descriptor.
pub(crate) fn pack(modules: &[Module]) -> Result<File> {
    let busybox = busybox()?;
    let agent = fs::read("/proc/self/exe").context("the lab's own binary could not be read")?;
    let mut archive = Archive::default();
    archive.entry("dev", DIRECTORY, &[]);
    archive.entry("host", DIRECTORY, &[]);
    archive.entry("busybox", PROGRAM, &busybox);
    archive.entry("agent", PROGRAM, &agent);
    archive.entry("init", PROGRAM, init().as_bytes());
    modules::add(&mut archive, modules);
    // Without CLOEXEC, because QEMU inherits the descriptor.
    let mut file = File::from(memfd_create("lab-initramfs", MemfdFlags::empty())?);
    file.write_all(&archive.finish())?;
    file.rewind()?;
    Ok(file)
}

/// Returns the script that runs first in the machine. It copies the agent to /run, the one part of
/// the host's tree that belongs to the machine by then, so that a rebuild on the host cannot
/// replace the running binary.
fn init() -> String {
    format!(
        "#!/busybox sh
[ ! -e /modules ] || for module in $(/busybox cat /modules/order); do
    /busybox insmod /modules/$module || echo \"lab: $module could not be loaded\"
done
/busybox mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro {ROOT_TAG} /host &&
/busybox mount -t tmpfs tmpfs /host/run &&
/busybox cp /agent /host/run/lab-agent &&
exec /busybox switch_root /host /run/lab-agent agent
echo 'lab: the host root could not be mounted'
"
    )
}

fn busybox() -> Result<Vec<u8>> {
    let Some(path) = BUSYBOX.iter().find(|path| Path::new(path).exists()) else {
        bail!("busybox is not installed: run rust-vmm-ci/setup");
    };
    let busybox = fs::read(path).with_context(|| format!("{path} could not be read"))?;
    if asks_for_loader(&busybox) {
        bail!(
            "{path} needs shared libraries, which the lab's initramfs has not: install busybox-static (run rust-vmm-ci/setup)"
        );
    }
    Ok(busybox)
}

/// Returns whether an ELF binary names a dynamic loader; the name is near the start of the file.
pub(crate) fn asks_for_loader(elf: &[u8]) -> bool {
    let start = &elf[..elf.len().min(4096)];
    start.windows(8).any(|bytes| bytes == b"ld-linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_binaries_are_recognised() {
        assert!(asks_for_loader(b"\x7fELF....../lib64/ld-linux-x86-64.so.2"));
        assert!(!asks_for_loader(b"\x7fELF......"));
    }
}
