// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages of a userfaultfd: faults, and changes of the process to its own memory.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general as raw;

/// Length of one message, in bytes.
pub(crate) const MESSAGE: usize = size_of::<raw::uffd_msg>();

/// One message of a userfaultfd.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A thread touched a page, and waits.
    Pagefault {
        /// The address of the page, or with [`EXACT_ADDRESS`](crate::Features::EXACT_ADDRESS) the
        /// exact address that was touched.
        address: u64,
        /// Whether the access was a write.
        write: bool,
        /// Whether the page is in the memory object, and only its mapping is missing.
        minor: bool,
        /// Whether the page is mapped, but write-protected.
        write_protected: bool,
    },
    /// The process has forked; this is the child's userfaultfd.
    Fork(OwnedFd),
    /// A range has moved.
    Remap {
        /// Its old address.
        from: u64,
        /// Its new address.
        to: u64,
        /// Its length, in bytes.
        len: u64,
    },
    /// The pages of a range were freed.
    Remove {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// A range was unmapped.
    Unmap {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// KVM itself waits for a page of a virtual machine that this userfaultfd was registered with
    /// (a kernel patch). It waits until the page's bit is cleared, and checks it every 10 ms, and
    /// whenever any range is [woken](crate::Userfaultfd::wake) on this userfaultfd.
    Gfn {
        /// The memslot's number, with the address space in the upper half.
        slot: u32,
        /// The page's guest frame number.
        gfn: u64,
        /// Whether KVM is about to write the page.
        write: bool,
    },
    /// An event that this version does not know.
    Unknown(u8),
}

/// `UFFD_EVENT_GFN` and its flag, which the released kernel headers do not define.
const EVENT_GFN: u32 = 0x17;
const GFN_FLAG_WRITE: u32 = 1;

/// A decoded message, before a descriptor in it is taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Pagefault { flags: u64, address: u64 },
    Fork(u32),
    Remap([u64; 3]),
    Remove([u64; 2]),
    Unmap([u64; 2]),
    Gfn { slot: u32, flags: u32, gfn: u64 },
    Unknown(u8),
}

impl Message {
    /// Decodes a message: a byte with the event's number, and up to three words from byte 8 on.
    pub(crate) fn decode(bytes: &[u8; MESSAGE]) -> Self {
        let word = |index: usize| {
            let at = 8 + index * 8;
            u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
        };
        let half = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        match u32::from(bytes[0]) {
            raw::UFFD_EVENT_PAGEFAULT => Message::Pagefault { flags: word(0), address: word(1) },
            raw::UFFD_EVENT_FORK => Message::Fork(half(8)),
            raw::UFFD_EVENT_REMAP => Message::Remap([word(0), word(1), word(2)]),
            raw::UFFD_EVENT_REMOVE => Message::Remove([word(0), word(1)]),
            raw::UFFD_EVENT_UNMAP => Message::Unmap([word(0), word(1)]),
            EVENT_GFN => Message::Gfn { slot: half(8), flags: half(12), gfn: word(1) },
            _ => Message::Unknown(bytes[0]),
        }
    }

    /// Converts the message to an event.
    ///
    /// # Safety
    ///
    /// The message was read from a userfaultfd, and is converted only once.
    pub(crate) unsafe fn into_event(self) -> Event {
        match self {
            Message::Pagefault { flags, address } => {
                let has = |flag: u32| flags & u64::from(flag) != 0;
                Event::Pagefault {
                    address,
                    write: has(raw::UFFD_PAGEFAULT_FLAG_WRITE),
                    minor: has(raw::UFFD_PAGEFAULT_FLAG_MINOR),
                    write_protected: has(raw::UFFD_PAGEFAULT_FLAG_WP),
                }
            }
            // SAFETY: by the caller's guarantee the kernel has just created this descriptor in this
            // process, and no other code owns it.
            Message::Fork(fd) => Event::Fork(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
            Message::Remap([from, to, len]) => Event::Remap { from, to, len },
            Message::Remove([start, end]) => Event::Remove { start, end },
            Message::Unmap([start, end]) => Event::Unmap { start, end },
            Message::Gfn { slot, flags, gfn } => {
                Event::Gfn { slot, gfn, write: flags & GFN_FLAG_WRITE != 0 }
            }
            Message::Unknown(event) => Event::Unknown(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u32, words: [u64; 3]) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[0] = event.try_into().expect("events are small numbers");
        for (index, word) in words.iter().enumerate() {
            bytes[8 + index * 8..][..8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn messages_are_taken_apart() {
        let decode = |event, words| Message::decode(&message(event, words));
        assert_eq!(MESSAGE, 32);
        assert_eq!(
            decode(raw::UFFD_EVENT_PAGEFAULT, [5, 0x7000, 0]),
            Message::Pagefault { flags: 5, address: 0x7000 }
        );
        assert_eq!(decode(raw::UFFD_EVENT_REMAP, [1, 2, 3]), Message::Remap([1, 2, 3]));
        assert_eq!(decode(raw::UFFD_EVENT_REMOVE, [1, 2, 9]), Message::Remove([1, 2]));
        assert_eq!(decode(raw::UFFD_EVENT_UNMAP, [1, 2, 9]), Message::Unmap([1, 2]));
        assert_eq!(decode(raw::UFFD_EVENT_FORK, [7, 0, 0]), Message::Fork(7));
        assert_eq!(
            decode(EVENT_GFN, [1 << 32 | 0x1_0002, 0x345, 9]),
            Message::Gfn { slot: 0x1_0002, flags: 1, gfn: 0x345 }
        );
        assert_eq!(decode(0xff, [0; 3]), Message::Unknown(0xff));
    }

    #[test]
    fn flags_of_a_fault_are_distinguished() {
        let flags = u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE | raw::UFFD_PAGEFAULT_FLAG_MINOR);
        // SAFETY: a fault carries no descriptor.
        let event = unsafe { Message::Pagefault { flags, address: 4096 }.into_event() };
        assert!(matches!(
            event,
            Event::Pagefault { address: 4096, write: true, minor: true, write_protected: false }
        ));
    }
}
