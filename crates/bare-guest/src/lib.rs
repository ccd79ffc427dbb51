// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

#[cfg(feature = "assembler")]
pub mod assembler;
mod mode;
mod page_tables;
#[cfg(feature = "assembler")]
pub mod summing;
mod vcpu;

pub use mode::{Mode, PROTECTED_GDT};
pub use page_tables::{LARGE_PAGE, PageTables};
pub use vcpu::{cpuid, start_at};
