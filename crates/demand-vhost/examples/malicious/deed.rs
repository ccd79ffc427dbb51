// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The deeds of a malicious back-end, and their names on the command line.

use std::fmt;
use std::str::FromStr;

/// Defines an enumeration whose values have names.
macro_rules! named {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$doc])* $value,)* }

        impl $name {
            pub(crate) const ALL: &[$name] = &[$($name::$value,)*];

            pub(crate) fn name(self) -> &'static str {
                match self { $($name::$value => $text,)* }
            }
        }
    };
}

named! {
    /// A request of the front-end, in the order of arrival.
    Step {
        GetFeatures = "get-features",
        GetProtocolFeatures = "get-protocol-features",
        GetQueueNum = "get-queue-num",
        SetFeatures = "set-features",
        GetConfig = "get-config",
        Advise = "advise",
        Listen = "listen",
        MemTable = "mem-table",
        /// The acknowledgement of the bases, which has no answer.
        MemAck = "mem-ack",
        /// The first request after the acknowledgement.
        Begin = "begin",
        VringNum = "vring-num",
        VringAddr = "vring-addr",
        VringBase = "vring-base",
        VringCall = "vring-call",
        VringKick = "vring-kick",
        VringEnable = "vring-enable",
        End = "end",
        GetVringBase = "get-vring-base",
        AddRegion = "add-region",
    }
}

named! {
    /// A wrong reaction to one request.
    Wrong {
        /// No answer.
        Silent = "silent",
        /// The connection is closed.
        HangUp = "hang-up",
        /// The request is refused.
        Refuse = "refuse",
        /// Only half of the answer is sent.
        Half = "half",
        /// The answer is longer than allowed, and its header says so.
        Long = "long",
        /// The answer's header announces four gigabytes, and many bytes follow.
        Huge = "huge",
        /// The answer belongs to another request.
        Other = "other",
        /// The answer is sent twice.
        Twice = "twice",
        /// Four descriptors are sent with the answer.
        Files = "files",
        /// The answer is sent at one byte per second.
        Trickle = "trickle",
    }
}

named! {
    /// The descriptor that is sent in place of a proper userfaultfd.
    Sent {
        None = "none",
        File = "file",
        Pipe = "pipe",
        Memfd = "memfd",
        Eventfd = "eventfd",
        Socket = "socket",
        /// Two descriptors.
        Two = "two",
        /// A userfaultfd that is not initialised.
        Raw = "raw",
        /// A userfaultfd of a process that has ended.
        Dead = "dead",
        /// A userfaultfd without any features.
        Plain = "plain",
        /// A userfaultfd with events for changes of the address space.
        Talkative = "talkative",
        /// A userfaultfd that is repeatedly made blocking while it is in use.
        Blocking = "blocking",
        /// A userfaultfd that is closed at once.
        Closed = "closed",
    }
}

named! {
    /// The address that is returned for a mapping.
    Base {
        /// The front-end's own address.
        Echo = "echo",
        /// An address in the middle of a page.
        Unaligned = "unaligned",
        /// The same address for all regions.
        Overlap = "overlap",
        /// An address so high that the region does not fit behind it.
        PastTheEnd = "past-the-end",
        /// An address where nothing is mapped.
        Unmapped = "unmapped",
        Zero = "zero",
        /// The address of private memory.
        Private = "private",
        /// The address of another memory object, which is touched later.
        Another = "another",
        /// The right address, but for one region only.
        TooFew = "too-few",
        /// The right address, but for another region.
        OtherRegions = "other-regions",
        /// The right address, but the mapping moves later.
        Moving = "moving",
    }
}

named! {
    /// The misuse of memory once it may be used.
    Mischief {
        /// All memory is read, which is allowed.
        Read = "read",
        /// Trapped addresses outside guest memory are touched.
        Outside = "outside",
        /// The same, and the waiting threads are woken to fault again, for three seconds.
        FloodOutside = "flood-outside",
        /// Four threads repeatedly drop guest memory from the page tables and touch it again, for
        /// three seconds.
        Flood = "flood",
        /// A page is unmapped while a thread waits for memory of the mapping.
        Unmap = "unmap",
        /// The memory object is truncated.
        Truncate = "truncate",
        /// Holes are punched into the memory object.
        Punch = "punch",
        /// Pages are overwritten.
        Scribble = "scribble",
        /// All memory is touched before the front-end learns its address, and read later.
        TouchEarly = "touch-early",
        /// The same, touched by the kernel as with `MAP_POPULATE`.
        PopulateEarly = "populate-early",
        /// The same, touched by the kernel as with `mlockall`.
        LockEarly = "lock-early",
    }
}

/// The one thing that a back-end does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Nothing.
    Behave,
    /// The back-end has no protocol features at all.
    NoProtocolFeatures,
    /// The back-end sends unrequested answers without end.
    FloodMessages,
    At(Wrong, Step),
    Uffd(Sent),
    Base(Base),
    /// The address that is returned for a region added later.
    #[allow(dead_code, reason = "the example, which shares this file with tests, adds no regions")]
    Added(Base),
    Memory(Mischief),
}

impl Deed {
    /// Returns all deeds, except those about regions that are added later: most front-ends add none.
    pub(crate) fn all() -> impl Iterator<Item = Deed> {
        let steps = || Step::ALL.iter().filter(|step| **step != Step::AddRegion);
        let at = move |wrong: &Wrong| {
            let wrong = *wrong;
            steps().map(move |step| Deed::At(wrong, *step))
        };
        [Deed::Behave, Deed::NoProtocolFeatures, Deed::FloodMessages]
            .into_iter()
            .chain(Sent::ALL.iter().map(|sent| Deed::Uffd(*sent)))
            .chain(Base::ALL.iter().map(|base| Deed::Base(*base)))
            .chain(Mischief::ALL.iter().map(|mischief| Deed::Memory(*mischief)))
            .chain(Wrong::ALL.iter().flat_map(at))
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Deed::Behave => f.write_str("behave"),
            Deed::NoProtocolFeatures => f.write_str("no-protocol-features"),
            Deed::FloodMessages => f.write_str("flood-messages"),
            Deed::At(wrong, step) => write!(f, "{}-at-{}", wrong.name(), step.name()),
            Deed::Uffd(sent) => write!(f, "uffd-{}", sent.name()),
            Deed::Base(base) => write!(f, "base-{}", base.name()),
            Deed::Added(base) => write!(f, "added-{}", base.name()),
            Deed::Memory(mischief) => write!(f, "memory-{}", mischief.name()),
        }
    }
}

impl FromStr for Deed {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Deed::all()
            .find(|deed| deed.to_string() == name)
            .ok_or_else(|| format!("there is no deed '{name}'; --list names them all"))
    }
}
