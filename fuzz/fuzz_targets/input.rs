// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the fuzzer's input piece by piece; returns zeros at its end.
#![allow(dead_code)] // Each target uses only a part of this module.

pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (here, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(here);
        self.0 = rest;
        bytes
    }

    pub fn slice(&mut self, len: usize) -> &'a [u8] {
        let (here, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        here
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    pub fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// Returns a number below `end`, which is at most 65536.
    pub fn below(&mut self, end: u64) -> u64 {
        u64::from(u16::from_le_bytes(self.bytes())) % end
    }
}
