// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The outcome of trying an engine on this host.

use std::io;

use serde::Serialize;

use crate::Engine;

/// The outcome of running a guest of one missing page under an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Trial {
    /// A vCPU that touched the page left `KVM_RUN` as it should.
    Works,
    /// KVM refused a feature that the engine needs; with `EINVAL` (22) if it does not know the
    /// feature.
    Refused {
        /// The error number from KVM.
        errno: i32,
    },
    /// KVM accepted the feature, but did not stop the guest at the missing page: on this kernel it
    /// means something else.
    Ignored,
    /// The engine could not be tried.
    #[default]
    Untried,
}

impl Trial {
    /// Returns whether the engine can be used.
    pub fn works(self) -> bool {
        self == Trial::Works
    }

    /// Returns whether another trial under the same kernel has the same outcome. Other refusals,
    /// such as for lack of memory or by a filter of system calls, concern this process or this
    /// moment.
    pub(crate) fn is_lasting(self) -> bool {
        match self {
            Trial::Works | Trial::Ignored => true,
            Trial::Refused { errno } => matches!(errno, libc::EINVAL | libc::ENOTTY),
            Trial::Untried => false,
        }
    }

    /// Describes the outcome to the user: a clause for reports and errors.
    pub(crate) fn describe(self, engine: Engine) -> String {
        let needs = engine.needs();
        match self {
            Trial::Works => match engine {
                Engine::KvmAttributes => "KVM stops a vCPU at a missing page; experimental, see \
                                          its limits"
                    .to_owned(),
                _ => "KVM stops a vCPU at a missing page".to_owned(),
            },
            Trial::Refused { errno } => {
                format!("KVM refuses {needs}: {}", io::Error::from_raw_os_error(errno))
            }
            Trial::Ignored => {
                format!("KVM accepts {needs}, but does not stop a vCPU at a missing page")
            }
            Trial::Untried => format!("{needs} could not be tried"),
        }
    }
}
