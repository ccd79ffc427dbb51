// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test guest's code: an interpreter of steps, for 64-bit mode without an operating system.
//!
//! It accesses only the control region and the addresses in its steps, and uses few and common
//! instructions, so that it also runs on a KVM that emulates each of them.
//!
//! | register | content |
//! |---|---|
//! | rdi | the step, 32 bytes: opcode, address, value, 0 |
//! | rsi | the table of handlers |
//! | rbp | this vCPU's result block |
//! | rsp | its stack |
//! | rbx, rcx | address and value of the step |
//! | rdx | the value found |
//! | r8 | polls until the next report to the VMM |

use bare_guest::assembler::code_asm::*;
use bare_guest::assembler::{IcedError, assemble_with_labels};

use crate::plan::{Step, Width};

/// The port on which a vCPU reports the end of its program: [`DONE`] or [`FAILED`] in al.
pub const PORT_END: u16 = 0xf4;
/// The port on which a vCPU reports from time to time that it is waiting. The VMM may run other
/// threads, and then enters the vCPU again.
pub const PORT_WAIT: u16 = 0xf5;

/// Not yet started, or running.
pub const RUNNING: u64 = 0;
/// The program has completed.
pub const DONE: u64 = 1;
/// A step found a value other than the expected one.
pub const FAILED: u64 = 2;
/// The vCPU has waited for a while at the step in the result block.
pub const WAITING: u64 = 3;

/// Size of an encoded step, in bytes.
pub const STEP_BYTES: u64 = 32;
/// Size of a result block, in bytes.
pub const RESULT_BYTES: u64 = 64;

/// Number of polls between two reports to the VMM.
const POLLS: u32 = 256;

// Offsets in the result block.
pub(crate) const RESULT_STATE: u64 = 0;
pub(crate) const RESULT_STEP: u64 = 8;
pub(crate) const RESULT_ADDRESS: u64 = 16;
pub(crate) const RESULT_EXPECTED: u64 = 24;
pub(crate) const RESULT_FOUND: u64 = 32;

/// The operations of the interpreter; the discriminants are indices in the table of handlers.
#[derive(Clone, Copy, Debug)]
enum Opcode {
    Check1,
    Check2,
    Check4,
    Check8,
    Write1,
    Write2,
    Write4,
    Write8,
    Add,
    Call,
    WaitUsed,
    WaitFlag,
    End,
}

const OPCODES: usize = Opcode::End as usize + 1;

/// The encoded end of a program.
pub(crate) const END: [u64; 4] = [Opcode::End as u64, 0, 0, 0];

/// Encodes a step; `flag` returns the guest virtual address of a flag.
pub(crate) fn encode(step: &Step, flag: impl Fn(usize) -> u64) -> [u64; 4] {
    let (opcode, address, value) = match *step {
        Step::Check { address, expect, width } => {
            (width_of(Opcode::Check1, width), address, expect)
        }
        Step::Write { address, value, width } => (width_of(Opcode::Write1, width), address, value),
        Step::Add { address, value } => (Opcode::Add as u64, address, value),
        Step::Call { address, expect } => (Opcode::Call as u64, address, expect),
        Step::PublishAvail { address, value } => (Opcode::Write2 as u64, address, value.into()),
        Step::Kick { address, queue } => (Opcode::Write4 as u64, address, queue.into()),
        Step::WaitUsed { address, value } => (Opcode::WaitUsed as u64, address, value.into()),
        Step::WaitFlag { flag: number, at_least } => {
            (Opcode::WaitFlag as u64, flag(number), at_least)
        }
        Step::SetFlag { flag: number, value } => (Opcode::Write8 as u64, flag(number), value),
    };
    [opcode, address, value, 0]
}

/// Returns the opcode for `width`, given the first one, for a byte.
fn width_of(first: Opcode, width: Width) -> u64 {
    let more = match width {
        Width::One => 0,
        Width::Two => 1,
        Width::Four => 2,
        Width::Eight => 3,
    };
    first as u64 + more
}

/// The interpreter as machine code.
#[derive(Clone, Debug)]
pub struct GuestCode {
    /// The machine code.
    pub code: Vec<u8>,
    /// Address of its first instruction.
    pub entry: u64,
    /// The table of handlers, to which rsi points.
    pub handlers: Vec<u64>,
}

/// Assembles the interpreter to run at guest address `address`.
///
/// # Errors
/// If the assembler fails, which no address causes.
pub fn assemble(address: u64) -> Result<GuestCode, IcedError> {
    let (code, handlers) = assemble_with_labels(64, address, interpreter)?;
    Ok(GuestCode { code, entry: address, handlers })
}

/// Emits the interpreter, which begins with its first instruction; returns the opcodes' handlers.
fn interpreter(a: &mut CodeAssembler) -> Result<Vec<CodeLabel>, IcedError> {
    let mut fail = a.create_label();
    let mut handlers: Vec<CodeLabel> = (0..OPCODES).map(|_| a.create_label()).collect();

    dispatch(a)?;

    for opcode in [Opcode::Check1, Opcode::Check2, Opcode::Check4, Opcode::Check8] {
        a.set_label(&mut handlers[opcode as usize])?;
        match opcode {
            Opcode::Check1 => a.movzx(edx, byte_ptr(rbx))?,
            Opcode::Check2 => a.movzx(edx, word_ptr(rbx))?,
            Opcode::Check4 => a.mov(edx, dword_ptr(rbx))?,
            _ => a.mov(rdx, qword_ptr(rbx))?,
        }
        a.cmp(rdx, rcx)?;
        a.jne(fail)?;
        next(a)?;
    }
    for opcode in [Opcode::Write1, Opcode::Write2, Opcode::Write4, Opcode::Write8] {
        a.set_label(&mut handlers[opcode as usize])?;
        match opcode {
            Opcode::Write1 => a.mov(byte_ptr(rbx), cl)?,
            Opcode::Write2 => a.mov(word_ptr(rbx), cx)?,
            Opcode::Write4 => a.mov(dword_ptr(rbx), ecx)?,
            _ => a.mov(qword_ptr(rbx), rcx)?,
        }
        next(a)?;
    }
    a.set_label(&mut handlers[Opcode::Add as usize])?;
    a.add(qword_ptr(rbx), rcx)?;
    next(a)?;

    a.set_label(&mut handlers[Opcode::Call as usize])?;
    a.call(rbx)?;
    a.mov(rdx, rax)?;
    a.cmp(rdx, rcx)?;
    a.jne(fail)?;
    next(a)?;

    // The distance is a signed 16-bit number, because indices wrap.
    let mut arrived = a.create_label();
    let mut poll = a.create_label();
    a.set_label(&mut handlers[Opcode::WaitUsed as usize])?;
    a.mov(r8d, POLLS)?;
    a.set_label(&mut poll)?;
    a.movzx(edx, word_ptr(rbx))?;
    a.mov(eax, edx)?;
    a.sub(eax, ecx)?;
    a.test(eax, 0x8000)?;
    a.je(arrived)?;
    poll_again(a, poll)?;
    a.set_label(&mut arrived)?;
    next(a)?;

    let mut set = a.create_label();
    let mut poll = a.create_label();
    a.set_label(&mut handlers[Opcode::WaitFlag as usize])?;
    a.mov(r8d, POLLS)?;
    a.set_label(&mut poll)?;
    a.mov(rdx, qword_ptr(rbx))?;
    a.cmp(rdx, rcx)?;
    a.jae(set)?;
    poll_again(a, poll)?;
    a.set_label(&mut set)?;
    next(a)?;

    a.set_label(&mut handlers[Opcode::End as usize])?;
    report(a, DONE)?;
    halt(a)?;

    a.set_label(&mut fail)?;
    report(a, FAILED)?;
    halt(a)?;
    Ok(handlers)
}

/// Emits code that continues with the next step.
#[expect(clippy::cast_possible_truncation, reason = "a step has 32 bytes")]
fn next(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.add(rdi, STEP_BYTES as i32)?;
    dispatch(a)
}

/// Emits code that executes the step at rdi.
fn dispatch(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(rdi))?;
    a.mov(rbx, qword_ptr(rdi + 8))?;
    a.mov(rcx, qword_ptr(rdi + 16))?;
    a.jmp(qword_ptr(rsi + rax * 8))
}

/// Emits code that polls again at `poll`, and reports to the VMM from time to time.
fn poll_again(a: &mut CodeAssembler, poll: CodeLabel) -> Result<(), IcedError> {
    a.pause()?;
    a.sub(r8d, 1)?;
    a.jne(poll)?;
    report(a, WAITING)?;
    a.out(PORT_WAIT as i32, al)?;
    a.mov(r8d, POLLS)?;
    a.jmp(poll)
}

/// Emits code that fills in the result block and puts the state in al. The step is stored as its
/// address, which the layout converts to an index.
#[expect(
    clippy::cast_possible_truncation,
    reason = "offsets in a block of 64 bytes, and states up to 3"
)]
fn report(a: &mut CodeAssembler, state: u64) -> Result<(), IcedError> {
    a.mov(qword_ptr(rbp + RESULT_STEP as i32), rdi)?;
    a.mov(qword_ptr(rbp + RESULT_ADDRESS as i32), rbx)?;
    a.mov(qword_ptr(rbp + RESULT_EXPECTED as i32), rcx)?;
    a.mov(qword_ptr(rbp + RESULT_FOUND as i32), rdx)?;
    a.mov(eax, state as u32)?;
    a.mov(qword_ptr(rbp + RESULT_STATE as i32), rax)
}

fn halt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut end = a.create_label();
    a.set_label(&mut end)?;
    a.out(PORT_END as i32, al)?;
    a.hlt()?;
    // A vCPU that is entered again reports the same again.
    a.jmp(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembled_code_has_a_handler_per_opcode() {
        let address = 0xf_0000_0000;
        let code = assemble(address).unwrap();
        assert_eq!(code.handlers.len(), OPCODES);
        assert!(code.code.len() < 4096, "{}", code.code.len());
        let end = address + code.code.len() as u64;
        for (i, handler) in code.handlers.iter().enumerate() {
            assert!((address..end).contains(handler));
            assert!(!code.handlers[..i].contains(handler));
        }
        assert_eq!(code.entry, address);
    }

    #[test]
    fn widths_are_opcodes() {
        let check = |width| Step::Check { address: 16, expect: 5, width };
        let encoded = |step| encode(&step, |flag| 0x1000 + flag as u64);
        assert_eq!(encoded(check(Width::One)), [Opcode::Check1 as u64, 16, 5, 0]);
        assert_eq!(encoded(check(Width::Eight)), [Opcode::Check8 as u64, 16, 5, 0]);
        let set = Step::SetFlag { flag: 3, value: 9 };
        assert_eq!(encoded(set), [Opcode::Write8 as u64, 0x1003, 9, 0]);
    }
}
