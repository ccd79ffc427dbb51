// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a malicious back-end does wrong, and the names of that on the command line.

use std::fmt;
use std::str::FromStr;

/// An enumeration whose values have names.
macro_rules! named {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* $value,)* }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$value,)*];

            pub fn name(self) -> &'static str {
                match self { $($name::$value => $text,)* }
            }
        }
    };
}

named! {
    /// A request of the front-end, by the order in which they come.
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
    }
}

named! {
    /// What is done instead of the right answer to one request.
    Wrong {
        /// No answer.
        Silent = "silent",
        /// The connection is closed.
        HangUp = "hang-up",
        /// It is refused.
        Refuse = "refuse",
        /// Only half of the answer comes.
        Half = "half",
        /// The answer is longer than it may be, and says so.
        Long = "long",
        /// The answer says that four gigabytes follow, and many bytes do.
        Huge = "huge",
        /// The answer is one to something else.
        Other = "other",
        /// The answer comes twice.
        Twice = "twice",
        /// Four descriptors come with the answer.
        Files = "files",
        /// The answer comes at one byte a second.
        Trickle = "trickle",
    }
}

named! {
    /// What is sent for a userfaultfd.
    Sent {
        None = "none",
        File = "file",
        Pipe = "pipe",
        Memfd = "memfd",
        Eventfd = "eventfd",
        Socket = "socket",
        /// Two of them.
        Two = "two",
        /// One that is not initialised.
        Raw = "raw",
        /// One of a process that has ended.
        Dead = "dead",
        /// One without any features.
        Plain = "plain",
        /// One that tells of everything that happens to the address space.
        Talkative = "talkative",
        /// One that is made blocking again and again, once it is in use.
        Blocking = "blocking",
        /// One that is closed at once.
        Closed = "closed",
    }
}

named! {
    /// Which address is named for a mapping.
    Base {
        /// The front-end's own.
        Echo = "echo",
        /// One in the middle of a page.
        Unaligned = "unaligned",
        /// One for all regions.
        Overlap = "overlap",
        /// One past which the region does not fit.
        PastTheEnd = "past-the-end",
        /// One where nothing is mapped.
        Unmapped = "unmapped",
        Zero = "zero",
        /// That of private memory.
        Private = "private",
        /// That of another memory object, which is touched later.
        Another = "another",
        /// The right one, but for one region only.
        TooFew = "too-few",
        /// The right one, but for another region.
        OtherRegions = "other-regions",
        /// The right one, which moves later.
        Moving = "moving",
    }
}

named! {
    /// What is done to memory once it may be used.
    Mischief {
        /// All of it is read: no mischief.
        Read = "read",
        /// Addresses are touched that are trapped, but are no guest memory.
        Outside = "outside",
        /// The same, and those who wait there are woken to do it again, for three seconds.
        FloodOutside = "flood-outside",
        /// Guest memory is forgotten and touched again, by four threads for three seconds.
        Flood = "flood",
        /// It is unmapped where a thread waits for it.
        Unmap = "unmap",
        /// The memory object is made shorter.
        Truncate = "truncate",
        /// Pages of the memory object are given back.
        Punch = "punch",
        /// Pages are overwritten.
        Scribble = "scribble",
        /// All of it is touched before the front-end is told where it is mapped, and read later.
        TouchEarly = "touch-early",
        /// The same, by the kernel, as for `MAP_POPULATE`.
        PopulateEarly = "populate-early",
        /// The same, as `mlockall` has it done.
        LockEarly = "lock-early",
    }
}

/// What a back-end does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Nothing.
    Behave,
    /// It has no protocol features at all.
    NoProtocolFeatures,
    /// It sends answers that nobody has asked for, without end.
    FloodMessages,
    At(Wrong, Step),
    Uffd(Sent),
    Base(Base),
    Memory(Mischief),
}

impl Deed {
    /// Each of them.
    pub fn all() -> impl Iterator<Item = Deed> {
        let at = |wrong: &Wrong| Step::ALL.iter().map(|step| Deed::At(*wrong, *step)).collect();
        [Deed::Behave, Deed::NoProtocolFeatures, Deed::FloodMessages]
            .into_iter()
            .chain(Sent::ALL.iter().map(|sent| Deed::Uffd(*sent)))
            .chain(Base::ALL.iter().map(|base| Deed::Base(*base)))
            .chain(Mischief::ALL.iter().map(|mischief| Deed::Memory(*mischief)))
            .chain(Wrong::ALL.iter().flat_map(at as fn(&Wrong) -> Vec<Deed>))
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
