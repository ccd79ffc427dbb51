// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file systems that a host cache cannot use, because other hosts may use them, too.
//!
//! Locks and file sizes of such a file system may be seen late or not at all by another host, a
//! read may take as long as one from the store, and a server that is away blocks it for ever. FUSE
//! is refused as a whole: the kernel does not tell sshfs from a file system on a local disk.

/// Magic numbers of the refused file systems, with their names. Sources:
/// include/uapi/linux/magic.h, and the file systems' own sources.
const REFUSED: &[(u32, &str)] = &[
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "OpenAFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x564c, "NCP"),
    (0x6573_5546, "FUSE"),
    (0x0bd0_0bd0, "Lustre"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x4750_4653, "GPFS"),
    (0x2003_0528, "OrangeFS"),
    (0x1983_0326, "BeeGFS"),
    (0x786f_4256, "a VirtualBox shared folder"),
    (0x6a65_6a63, "a VMware shared folder"),
];

/// Returns the name of a refused file system, by its magic number as `statfs` returns it.
pub(crate) fn refused(magic: u64) -> Option<&'static str> {
    // Magic numbers have 32 bits, which some architectures return with a sign.
    let magic = (magic & 0xffff_ffff) as u32;
    REFUSED.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_of_other_hosts_are_refused() {
        // Numbers of statfs(2), written down again.
        for (magic, name) in [
            (26985, "NFS"),
            (4_283_649_346, "CIFS"),
            (4_266_872_130, "SMB2"),
            (12_805_120, "Ceph"),
            (16_914_839, "9P"),
            (1_702_057_286, "FUSE"),
            (1_397_113_167, "OpenAFS"),
            (1_799_439_955, "AFS"),
            // With a sign, as a 32-bit number that was widened.
            (0xffff_ffff_ff53_4d42, "CIFS"),
        ] {
            assert_eq!(refused(magic), Some(name));
        }
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS, F2FS.
        let local =
            [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1, 0xf2f5_2010];
        for magic in local {
            assert_eq!(refused(magic), None, "{magic:#x}");
        }
    }
}
