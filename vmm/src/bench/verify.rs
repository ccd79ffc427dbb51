// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The check that a measured guest has seen and left the right bytes.

use demand_memory::{DemandMemory, PAGE_SIZE, to_usize};
use demand_source::{Destination, PageSource};
use vm_memory::{Bytes, GuestAddress};

use super::error::BenchError;
use super::guest::{MEMORY_ADDRESS, mix, written};
use super::options::Access;
use crate::error::Error;

/// Compares with the source both what a vCPU has read and the content of its pages.
pub(super) struct Verifier<'a> {
    pub(super) access: Access,
    pub(super) source: &'a dyn PageSource,
    pub(super) memory: &'a DemandMemory,
}

impl Verifier<'_> {
    /// Verifies vCPU `cpu`, which has touched the addresses in `table` and computed `seen` from the
    /// words that it read.
    pub(super) fn verify(&self, cpu: usize, table: &[u64], seen: u32) -> Result<(), Error> {
        let mut hash = 0;
        let mut expected = vec![0; to_usize(PAGE_SIZE)];
        let mut found = expected.clone();
        for (index, address) in table.iter().enumerate() {
            let page = address & !(PAGE_SIZE - 1);
            let mut destination = Destination::from(&mut expected[..]);
            self.source.read_through(page - MEMORY_ADDRESS, &mut destination)?;
            drop(destination);
            let word = &mut expected[to_usize(address - page)..][..4];
            match self.access {
                Access::Read => {
                    hash = mix(hash, u32::from_le_bytes(word.try_into().expect("4 bytes")));
                }
                Access::Write => {
                    word.copy_from_slice(&written(index, table.len()).to_le_bytes());
                }
            }
            self.memory.read_slice(&mut found, GuestAddress(page)).map_err(BenchError::Read)?;
            if let Some(at) = expected.iter().zip(&found).position(|(a, b)| a != b) {
                return Err(BenchError::Content {
                    cpu,
                    expected: expected[at],
                    address: page + at as u64,
                    found: found[at],
                }
                .into());
            }
        }
        if hash != seen {
            return Err(BenchError::Hash { cpu, seen, expected: hash }.into());
        }
        Ok(())
    }
}
