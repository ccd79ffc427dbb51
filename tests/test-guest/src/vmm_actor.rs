// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Executes the VMM's own part of a plan.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use crate::content::PAGE_BYTES;
use crate::plan::{Plan, VmmStep};

/// Errors of the VMM's part of a plan.
#[derive(Debug, thiserror::Error)]
pub enum ActorError {
    /// Memory differs from the expected content.
    #[error(
        "step {step} of the VMM's part: the 8 bytes at {address:#x} are {found:#018x}, not \
         {expected:#018x}; guest memory is wrong"
    )]
    Mismatch {
        /// Index of the step.
        step: usize,
        /// Guest physical address.
        address: u64,
        /// The expected value.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// The memory refused an access.
    #[error("step {step} of the VMM's part: cannot access guest memory at {address:#x}: {error}")]
    Access {
        /// Index of the step.
        step: usize,
        /// Guest physical address.
        address: u64,
        /// The memory's error.
        error: String,
    },
    /// The caller stopped it.
    #[error("step {step} of the VMM's part: stopped before its end")]
    Stopped {
        /// Index of the step.
        step: usize,
    },
}

/// Executes the VMM's part of `plan` on the calling thread, through `memory`. Waits for the vCPUs
/// as long as needed, unless `stop` becomes true. `flags` are the ones that the vCPUs use.
///
/// # Errors
/// If memory differs from the expected content or cannot be accessed, or if stopped.
pub fn run_vmm_actor<M>(
    plan: &Plan,
    flags: &[AtomicU64],
    memory: &M,
    stop: &AtomicBool,
) -> Result<(), ActorError>
where
    M: Bytes<GuestAddress> + ?Sized,
    M::E: Display,
{
    let windows = plan.windows();
    let mut page_found = Box::new([0; PAGE_BYTES]);
    let mut page_expected = Box::new([0; PAGE_BYTES]);
    for (step, action) in plan.vmm_steps().iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(ActorError::Stopped { step });
        }
        let refused = |address: u64, error: M::E| ActorError::Access {
            step,
            address,
            error: error.to_string(),
        };
        match *action {
            VmmStep::CheckPage { page } => {
                let address = windows.guest_address(page * PAGE_BYTES as u64);
                memory
                    .read_slice(&mut page_found[..], GuestAddress(address))
                    .map_err(|error| refused(address, error))?;
                plan.content().page(page, &mut page_expected);
                let (found, _) = page_found.as_chunks::<8>();
                let (expected, _) = page_expected.as_chunks::<8>();
                for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                    compare(step, address + 8 * i as u64, *expected, *found)?;
                }
            }
            VmmStep::Check { address, expect } => {
                let address = windows.guest_address(address);
                let mut found = [0; 8];
                memory
                    .read_slice(&mut found, GuestAddress(address))
                    .map_err(|error| refused(address, error))?;
                compare(step, address, expect.to_le_bytes(), found)?;
            }
            VmmStep::Write { address, value } => {
                let address = windows.guest_address(address);
                memory
                    .write_slice(&value.to_le_bytes(), GuestAddress(address))
                    .map_err(|error| refused(address, error))?;
            }
            VmmStep::WaitFlag { flag, at_least } => {
                let mut turns = 0u32;
                while flags[flag].load(Ordering::Acquire) < at_least {
                    if stop.load(Ordering::Relaxed) {
                        return Err(ActorError::Stopped { step });
                    }
                    turns += 1;
                    if turns < 100 {
                        std::thread::yield_now();
                    } else {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
            }
            VmmStep::SetFlag { flag, value } => flags[flag].store(value, Ordering::Release),
        }
    }
    Ok(())
}

fn compare(step: usize, address: u64, expected: [u8; 8], found: [u8; 8]) -> Result<(), ActorError> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (u64::from_le_bytes(expected), u64::from_le_bytes(found));
    Err(ActorError::Mismatch { step, address, expected, found })
}
