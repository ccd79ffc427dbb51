// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the guest's program, given on the console.

use std::fmt;
use std::str::FromStr;

/// A command: one line on the guest's console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Ends the work, verifies all of it, prints `done`, and turns the machine off.
    Stop,
    /// Restarts the machine at once.
    Reset(ResetBy),
    /// Makes the kernel panic.
    Panic,
    /// Halts the machine, which stays on.
    Halt,
    /// Announces that the clocks are about to jump: the next jump is reported, but is not an error.
    Jump,
    /// Corrupts one byte of the memory under work, which must be detected.
    Poke,
}

/// The mechanism by which the kernel restarts the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetBy {
    /// The kernel's choice.
    Choice,
    /// ACPI's reset register.
    Acpi,
    /// The keyboard controller.
    Keyboard,
    /// The reset control register.
    Pci,
    /// The BIOS entry point.
    Bios,
    /// A triple fault.
    TripleFault,
}

impl ResetBy {
    /// Returns the kernel's name for it, in `/sys/kernel/reboot/type`.
    pub fn word(self) -> Option<&'static str> {
        match self {
            Self::Choice => None,
            Self::Acpi => Some("acpi"),
            Self::Keyboard => Some("kbd"),
            Self::Pci => Some("pci"),
            Self::Bios => Some("bios"),
            Self::TripleFault => Some("triple"),
        }
    }
}

impl Command {
    const ALL: [(Self, &'static str); 11] = [
        (Self::Stop, "stop"),
        (Self::Reset(ResetBy::Choice), "reset"),
        (Self::Reset(ResetBy::Acpi), "reset-acpi"),
        (Self::Reset(ResetBy::Keyboard), "reset-kbd"),
        (Self::Reset(ResetBy::Pci), "reset-pci"),
        (Self::Reset(ResetBy::Bios), "reset-bios"),
        (Self::Reset(ResetBy::TripleFault), "reset-triple"),
        (Self::Panic, "panic"),
        (Self::Halt, "halt"),
        (Self::Jump, "jump"),
        (Self::Poke, "poke"),
    ];
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(command, _)| command == self);
        f.write_str(name.expect("all are listed").1)
    }
}

impl FromStr for Command {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(_, name)| *name == text);
        known.map(|(command, _)| *command).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, name)| *name).collect();
            format!("{text:?} is no command: the commands are {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_come_through() {
        for (command, _) in Command::ALL {
            assert_eq!(command.to_string().parse(), Ok(command));
        }
        assert!("stand".parse::<Command>().is_err());
    }
}
