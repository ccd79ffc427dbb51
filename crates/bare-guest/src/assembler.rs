// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs written as instructions.

pub use iced_x86::{IcedError, code_asm};

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{CodeAssembler, CodeLabel};

/// Assembles one program of `bits`-bit code (16, 32 or 64) to run at guest address `address`.
///
/// # Errors
///
/// Only if the instructions are wrong.
///
/// # Examples
///
/// ```
/// use bare_guest::assembler::assemble;
/// use bare_guest::assembler::code_asm::al;
///
/// let code = assemble(32, 0x1000, |asm| {
///     asm.out(0x80u32, al)?;
///     asm.hlt()
/// })?;
/// assert_eq!(code, [0xe6, 0x80, 0xf4]);
/// # Ok::<(), bare_guest::assembler::IcedError>(())
/// ```
pub fn assemble(
    bits: u32,
    address: u64,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(bits)?;
    build(&mut asm)?;
    asm.assemble(address)
}

/// Assembles one program as [`assemble`] does, and also returns the guest addresses of the labels
/// that `build` returns.
///
/// # Errors
///
/// Only if the instructions are wrong, or a returned label is not set.
pub fn assemble_with_labels(
    bits: u32,
    address: u64,
    build: impl FnOnce(&mut CodeAssembler) -> Result<Vec<CodeLabel>, IcedError>,
) -> Result<(Vec<u8>, Vec<u64>), IcedError> {
    let mut asm = CodeAssembler::new(bits)?;
    let labels = build(&mut asm)?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = asm.assemble_options(address, options)?;
    let addresses = labels.iter().map(|label| assembled.label_ip(label)).collect::<Result<_, _>>();
    Ok((assembled.inner.code_buffer, addresses?))
}

/// Several programs, one behind another in guest memory.
#[derive(Clone, Debug)]
pub struct Programs {
    bits: u32,
    start: u64,
    code: Vec<u8>,
}

impl Programs {
    /// Creates no programs yet, of `bits`-bit code (16, 32 or 64), from guest address `start` on.
    pub fn new(bits: u32, start: u64) -> Self {
        Programs { bits, start, code: Vec::new() }
    }

    /// Assembles another program, and returns the guest address of its first instruction.
    ///
    /// # Errors
    ///
    /// As for [`assemble`].
    pub fn add(
        &mut self,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<u64, IcedError> {
        let address = self.start + self.code.len() as u64;
        self.code.extend(assemble(self.bits, address, build)?);
        Ok(address)
    }

    /// Returns the code of all programs.
    pub fn into_code(self) -> Vec<u8> {
        self.code
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use code_asm::eax;

    #[test]
    fn programs_follow_each_other() {
        let mut programs = Programs::new(32, 0x1000);
        let first = programs.add(|asm| asm.inc(eax)).unwrap();
        let second = programs.add(|asm| asm.hlt()).unwrap();
        assert_eq!((first, second), (0x1000, 0x1001));
        assert_eq!(programs.into_code(), [0x40, 0xf4]);
    }

    #[test]
    fn labels_have_addresses() {
        let (code, labels) = assemble_with_labels(64, 0x2000, |asm| {
            let mut end = asm.create_label();
            asm.nop()?;
            asm.set_label(&mut end)?;
            asm.hlt()?;
            Ok(vec![end])
        })
        .unwrap();
        assert_eq!((code, labels), (vec![0x90, 0xf4], vec![0x2001]));
    }
}
