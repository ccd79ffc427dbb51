// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interface between a test and the init program of its Linux guest: [`Work`] is the program's
//! task, given on the kernel's command line, and [`Line`] is its output on the console.
//!
//! The program itself, `guest-work`, is `/init` of the guest's initramfs. While it runs it takes
//! commands from the console, one per line; see [`Command`].
//!
//! ```
//! use guest_work::{Line, Work};
//!
//! let work: Work = "prove,memory=16M,journal=ext4".parse().unwrap();
//! assert_eq!(work.to_string(), "prove,memory=16M,journal=ext4");
//!
//! let line =
//!     "guest: beat 3 pages=4096 records=12 echoes=0 lost=0 mono_us=15 real_us=1700000000000000";
//! match line.parse() {
//!     Ok(Line::Beat(beat)) => assert_eq!(beat.records, 12),
//!     other => panic!("{other:?}"),
//! }
//! ```

mod command;
mod line;
mod work;

pub use command::{Command, ResetBy};
pub use line::{Beat, Line, NoLine};
pub use work::{Journal, Prove, Work};
