// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The choice between memory that arrives on demand and memory that is read first.

use std::fmt;
use std::str::FromStr;

/// Whether memory arrives as it is used, or is read before the guest runs.
///
/// # Examples
///
/// ```
/// use demand_paging::Lazy;
///
/// assert_eq!("require".parse(), Ok(Lazy::Require));
/// assert_eq!(Lazy::default().to_string(), "auto");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Lazy {
    /// Memory arrives as it is used, where the host allows that; elsewhere all of it is read first,
    /// and a warning is logged. An engine that was named is not replaced by reading: its absence is
    /// an error.
    #[default]
    Auto,
    /// Memory arrives as it is used, or an error says why it cannot.
    Require,
    /// All memory is read before the VM gets it. This needs neither a userfaultfd nor an engine,
    /// only `/dev/kvm`.
    Off,
}

impl Lazy {
    /// All choices.
    pub const ALL: [Lazy; 3] = [Lazy::Auto, Lazy::Require, Lazy::Off];

    /// Returns the choice's name, as [`FromStr`] parses it.
    pub const fn name(self) -> &'static str {
        match self {
            Lazy::Auto => "auto",
            Lazy::Require => "require",
            Lazy::Off => "off",
        }
    }
}

impl fmt::Display for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The error from parsing a text that is not the name of a [`Lazy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown choice '{name}'; choose one of {}", Lazy::ALL.map(Lazy::name).join(", "))]
pub struct ParseLazyError {
    name: String,
}

impl FromStr for Lazy {
    type Err = ParseLazyError;

    fn from_str(name: &str) -> Result<Self, ParseLazyError> {
        let lazy = Lazy::ALL.into_iter().find(|lazy| lazy.name() == name);
        lazy.ok_or_else(|| ParseLazyError { name: name.into() })
    }
}
