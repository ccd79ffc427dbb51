// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes cpio archives, the format of an initramfs.

/// Mode of a folder.
pub(crate) const DIRECTORY: u32 = 0o040_755;
/// Mode of a program.
pub(crate) const PROGRAM: u32 = 0o100_755;

/// A cpio archive in the "newc" format, which the kernel unpacks.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file or folder. The folder that contains it must be added first.
    pub(crate) fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("the files of an initramfs are small");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
        // rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds the trailer and returns the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_the_newc_layout() {
        let mut archive = Archive::default();
        archive.entry("abc", PROGRAM, b"hello");
        let bytes = archive.finish();
        // Header 110, name and its NUL 4, padding 2, content 5, padding 3.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081ed");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000004");
        assert_eq!(&bytes[110..114], b"abc\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.windows(11).any(|name| name == b"TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
