// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of the guest's program: `work=...` on the kernel's command line.

use std::fmt;
use std::str::FromStr;

/// The task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Work {
    /// Only waits for commands: `idle`.
    #[default]
    Idle,
    /// Self-verifying work: `prove`, followed by options.
    Prove(Prove),
}

/// The place of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// None; no disk is needed.
    None,
    /// The raw disk, from its first byte on.
    Raw,
    /// A file of the ext4 file system on the disk.
    Ext4,
}

impl Journal {
    const ALL: [(Self, &'static str); 3] =
        [(Self::None, "none"), (Self::Raw, "raw"), (Self::Ext4, "ext4")];
}

/// The options of `prove`: `NAME=VALUE`, separated by commas. Default values are not printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prove {
    /// `memory`: size of the memory to work on in bytes, a multiple of 1 MiB; 32M by default.
    pub memory: u64,
    /// `rest`: pause of each CPU after 64 pages, in microseconds; 2000 by default.
    pub rest_us: u64,
    /// `journal`: `none`, `raw` or `ext4`; `raw` by default.
    pub journal: Journal,
    /// `device`: path of the disk; /dev/vda by default.
    pub device: String,
    /// `slots`: number of places for records, 4K each; 1024 by default.
    pub slots: u64,
    /// `every`: milliseconds between two records; 10 by default.
    pub every_ms: u64,
    /// `beat`: milliseconds between two beats; 1000 by default.
    pub beat_ms: u64,
    /// `beats`: number of beats until the work stops by itself; 0, which means never, by default.
    pub beats: u64,
    /// `file`: size in bytes of a file that is read repeatedly from the disk, a multiple of 1 MiB,
    /// with `journal=ext4` only; none by default.
    pub file: u64,
    /// `echo`: number of echo requests in flight at a time, over the network card eth0 to the host
    /// that answers for 10.0.0.2, at most 64; none by default, and then no card is needed.
    pub echo: u64,
    /// `jump`: milliseconds that a beat may be late, beyond which a clock has jumped; 60000 by
    /// default.
    pub jump_ms: u64,
}

/// Few enough to have distinct 16-bit numbers, and to fit into the packet queues.
const MOST_ECHOES: u64 = 64;

impl Default for Prove {
    fn default() -> Self {
        Self {
            memory: 32 << 20,
            rest_us: 2000,
            journal: Journal::Raw,
            device: "/dev/vda".into(),
            slots: 1024,
            every_ms: 10,
            beat_ms: 1000,
            beats: 0,
            file: 0,
            echo: 0,
            jump_ms: 60_000,
        }
    }
}

impl Work {
    /// Returns the task on a kernel's command line; idle if there is none.
    ///
    /// # Errors
    ///
    /// A line that describes the mistake.
    pub fn of_command_line(line: &str) -> Result<Self, String> {
        let asked = line.split_whitespace().find_map(|word| word.strip_prefix("work="));
        asked.map_or(Ok(Self::Idle), str::parse)
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::Prove(prove) => write!(f, "prove{prove}"),
        }
    }
}

impl fmt::Display for Prove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual = Self::default();
        if self.memory != usual.memory {
            write!(f, ",memory={}M", self.memory >> 20)?;
        }
        if self.journal != usual.journal {
            let name = Journal::ALL.iter().find(|(journal, _)| *journal == self.journal);
            write!(f, ",journal={}", name.expect("all are listed").1)?;
        }
        if self.device != usual.device {
            write!(f, ",device={}", self.device)?;
        }
        if self.file != usual.file {
            write!(f, ",file={}M", self.file >> 20)?;
        }
        let numbers = [
            ("rest", self.rest_us, usual.rest_us),
            ("slots", self.slots, usual.slots),
            ("every", self.every_ms, usual.every_ms),
            ("beat", self.beat_ms, usual.beat_ms),
            ("beats", self.beats, usual.beats),
            ("echo", self.echo, usual.echo),
            ("jump", self.jump_ms, usual.jump_ms),
        ];
        for (name, number, usual) in numbers {
            if number != usual {
                write!(f, ",{name}={number}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, options) = text.split_once(',').unwrap_or((text, ""));
        match kind {
            "idle" if options.is_empty() => return Ok(Self::Idle),
            "idle" => return Err(format!("work=idle takes no options, and {options:?} was given")),
            "prove" => {}
            _ => return Err(format!("work={kind:?} is unknown: it is idle or prove")),
        }
        let mut prove = Prove::default();
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option
                .split_once('=')
                .ok_or_else(|| format!("work=prove,{option}: this takes NAME=VALUE"))?;
            let number = || value.parse().map_err(|_| format!("{option}: {value:?} is no number"));
            let size = || {
                let mebibytes = value.strip_suffix('M').and_then(|m| m.parse::<u64>().ok());
                mebibytes
                    .and_then(|m| m.checked_mul(1 << 20))
                    .ok_or_else(|| format!("{option}: a size such as 32M is needed"))
            };
            match name {
                "memory" => prove.memory = size()?,
                "file" => prove.file = size()?,
                "journal" => {
                    let known = Journal::ALL.iter().find(|(_, name)| *name == value);
                    prove.journal =
                        known.ok_or_else(|| format!("{option}: it is none, raw or ext4"))?.0;
                }
                "device" => prove.device = value.into(),
                "rest" => prove.rest_us = number()?,
                "slots" => prove.slots = number()?,
                "every" => prove.every_ms = number()?,
                "beat" => prove.beat_ms = number()?,
                "beats" => prove.beats = number()?,
                "echo" => prove.echo = number()?,
                "jump" => prove.jump_ms = number()?,
                _ => return Err(format!("work=prove has no option {name:?}")),
            }
        }
        if prove.slots == 0 || prove.beat_ms == 0 {
            return Err("work=prove: slots and beat cannot be 0".into());
        }
        if prove.file != 0 && prove.journal != Journal::Ext4 {
            return Err("work=prove: a file is on a file system: journal=ext4 is needed".into());
        }
        if prove.echo > MOST_ECHOES {
            return Err(format!(
                "work=prove: at most {MOST_ECHOES} echoes are under way at a time"
            ));
        }
        Ok(Self::Prove(prove))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_through() {
        for text in [
            "idle",
            "prove",
            "prove,memory=8M,journal=ext4,device=/dev/vdb,file=2M,rest=1,slots=2,every=3,beat=4,beats=5,echo=6,jump=7",
        ] {
            let work: Work = text.parse().expect("is right");
            assert_eq!(work.to_string(), text);
        }
        let work = Work::of_command_line("console=ttyS0 work=prove,beats=2 quiet\n");
        assert_eq!(work, Ok(Work::Prove(Prove { beats: 2, ..Prove::default() })));
        assert_eq!(Work::of_command_line("console=ttyS0"), Ok(Work::Idle));
    }

    #[test]
    fn wrong_options_are_named() {
        for (text, named) in [
            ("sleep", "sleep"),
            ("idle,memory=1M", "memory"),
            ("prove,memory=8", "memory=8"),
            ("prove,journal=xfs", "xfs"),
            ("prove,beats=x", "beats"),
            ("prove,pages=1", "pages"),
            ("prove,memory=99999999999999999M", "memory"),
            ("prove,slots=0", "slots"),
            ("prove,file=1M", "journal=ext4"),
            ("prove,echo=65", "64 echoes"),
        ] {
            let error = text.parse::<Work>().expect_err(text);
            assert!(error.contains(named), "{error}");
        }
    }
}
