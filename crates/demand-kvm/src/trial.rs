// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What came of trying an engine on this host.

use std::io;

use serde::Serialize;

use crate::Engine;

/// Whether an engine is there: what came of running a guest of one missing page under it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Trial {
    /// A vCPU that touched the page left `KVM_RUN` as it should.
    Works,
    /// KVM refused what the engine needs; `EINVAL` (22) where it does not know it.
    Refused {
        /// What KVM said.
        errno: i32,
    },
    /// KVM took it, but the guest was not stopped at the missing page: here it means something
    /// else.
    Ignored,
    /// It could not be tried.
    #[default]
    Untried,
}

impl Trial {
    /// Whether the engine can be used.
    pub fn works(self) -> bool {
        self == Trial::Works
    }

    /// What came of it, for people: a clause for reports and errors.
    pub fn describe(self, engine: Engine) -> String {
        let needs = engine.needs();
        match self {
            Trial::Works => match engine {
                Engine::KvmAttributes => "KVM stops a vCPU at a missing page; experimental, see \
                                          what it does not do"
                    .to_owned(),
                _ => "KVM stops a vCPU at a missing page".to_owned(),
            },
            Trial::Refused { errno } => {
                format!("KVM refuses {needs}: {}", io::Error::from_raw_os_error(errno))
            }
            Trial::Ignored => {
                format!("KVM takes {needs}, but does not stop a vCPU at a missing page")
            }
            Trial::Untried => format!("{needs} could not be tried"),
        }
    }
}
