// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The output of the guest's program on the console.

use std::fmt;
use std::str::FromStr;

/// The start of each line.
const START: &str = "guest: ";

/// The progress of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Number of this beat, from 1.
    pub number: u64,
    /// Pages of 4K verified and rewritten, counted each time.
    pub pages: u64,
    /// Records written, synced and read back.
    pub records: u64,
    /// Echo requests answered.
    pub echoes: u64,
    /// Echo requests, or answers to them, that were lost; the requests were repeated.
    pub lost: u64,
    /// The guest's `CLOCK_MONOTONIC`, in microseconds.
    pub mono_us: u64,
    /// The guest's `CLOCK_REALTIME`, in microseconds since 1970.
    pub real_us: u64,
}

/// One line of the guest's program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// The guest is up; the work begins.
    Ready {
        /// Number of CPUs online.
        cpus: u64,
        /// The kernel's release.
        kernel: String,
        /// The kernel's clock source.
        clock: String,
    },
    /// The work progresses.
    Beat(Beat),
    /// The kernel learned that this machine is a copy, and reseeded its random numbers.
    Reseeded,
    /// The clocks made an announced jump.
    Jump {
        /// Advance of `CLOCK_MONOTONIC` since the previous beat, in microseconds.
        mono_us: u64,
        /// Change of `CLOCK_REALTIME` since the previous beat, in microseconds.
        real_us: i64,
    },
    /// The kernel complained.
    Kernel(String),
    /// A check failed; the machine is turned off.
    Wrong {
        /// The subject: `memory`, `journal`, `echo`, `clock`, `disk`, `net`, `work`.
        what: String,
        /// A description of the failure.
        why: String,
    },
    /// The work ended and all of it was verified; the machine is turned off.
    Done {
        /// Pages of 4K verified and rewritten, counted each time.
        pages: u64,
        /// Records written, synced and read back.
        records: u64,
        /// Echo requests answered.
        echoes: u64,
        /// Echo requests, or answers to them, that were lost; the requests were repeated.
        lost: u64,
        /// Complaints of the kernel; each had a line.
        complaints: u64,
    },
}

/// The error for a line that does not come from the guest's program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoLine;

impl fmt::Display for NoLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this is no line of the guest's program")
    }
}

impl std::error::Error for NoLine {}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(START)?;
        match self {
            Self::Ready { cpus, kernel, clock } => {
                write!(f, "ready cpus={cpus} kernel={kernel} clock={clock}")
            }
            Self::Beat(Beat { number, pages, records, echoes, lost, mono_us, real_us }) => write!(
                f,
                "beat {number} pages={pages} records={records} echoes={echoes} lost={lost} \
                 mono_us={mono_us} real_us={real_us}"
            ),
            Self::Reseeded => f.write_str("reseeded"),
            Self::Jump { mono_us, real_us } => {
                write!(f, "jump mono_us={mono_us} real_us={real_us}")
            }
            Self::Kernel(text) => write!(f, "KERNEL {text}"),
            Self::Wrong { what, why } => write!(f, "WRONG {what} {why}"),
            Self::Done { pages, records, echoes, lost, complaints } => write!(
                f,
                "done pages={pages} records={records} echoes={echoes} lost={lost} \
                 complaints={complaints}"
            ),
        }
    }
}

impl FromStr for Line {
    type Err = NoLine;

    fn from_str(line: &str) -> Result<Self, NoLine> {
        // Earlier output of the kernel may lack its end of line.
        let at = line.find(START).ok_or(NoLine)?;
        let line = line[at + START.len()..].trim_end();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Ok(match word {
            "ready" => Self::Ready {
                cpus: field(rest, "cpus")?,
                kernel: field(rest, "kernel")?,
                clock: field(rest, "clock")?,
            },
            "beat" => Self::Beat(Beat {
                number: rest.split(' ').next().and_then(|n| n.parse().ok()).ok_or(NoLine)?,
                pages: field(rest, "pages")?,
                records: field(rest, "records")?,
                echoes: field(rest, "echoes")?,
                lost: field(rest, "lost")?,
                mono_us: field(rest, "mono_us")?,
                real_us: field(rest, "real_us")?,
            }),
            "reseeded" => Self::Reseeded,
            "jump" => {
                Self::Jump { mono_us: field(rest, "mono_us")?, real_us: field(rest, "real_us")? }
            }
            "KERNEL" => Self::Kernel(rest.into()),
            "WRONG" => {
                let (what, why) = rest.split_once(' ').ok_or(NoLine)?;
                Self::Wrong { what: what.into(), why: why.into() }
            }
            "done" => Self::Done {
                pages: field(rest, "pages")?,
                records: field(rest, "records")?,
                echoes: field(rest, "echoes")?,
                lost: field(rest, "lost")?,
                complaints: field(rest, "complaints")?,
            },
            _ => return Err(NoLine),
        })
    }
}

/// Returns the value of `name=value` among words.
fn field<T: FromStr>(words: &str, name: &str) -> Result<T, NoLine> {
    words
        .split(' ')
        .filter_map(|word| word.split_once('='))
        .find(|(found, _)| *found == name)
        .and_then(|(_, value)| value.parse().ok())
        .ok_or(NoLine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_through() {
        let beat = Beat {
            number: 7,
            pages: 8,
            records: 9,
            echoes: 12,
            lost: 13,
            mono_us: 10,
            real_us: 11,
        };
        let lines = [
            Line::Ready { cpus: 2, kernel: "6.12.1".into(), clock: "tsc".into() },
            Line::Beat(beat),
            Line::Reseeded,
            Line::Jump { mono_us: 5, real_us: -6 },
            Line::Kernel("BUG: soft lockup - CPU#0 stuck".into()),
            Line::Wrong { what: "memory".into(), why: "page 3 is off".into() },
            Line::Done { pages: 1, records: 2, echoes: 3, lost: 4, complaints: 0 },
        ];
        for line in lines {
            assert_eq!(format!("[ 1.5] x{line}\r\n").parse(), Ok(line));
        }
    }

    #[test]
    fn half_a_line_is_none() {
        for bad in ["", "guest: ", "guest: beat 3 pages=1", "beat 3", "guest: WRONG memory"] {
            assert_eq!(bad.parse::<Line>(), Err(NoLine), "{bad}");
        }
    }
}
