// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages over TCP: a small page server, and the source that reads from it. It is the example of the
//! guide "Writing a source" (`crates/demand-source/docs/writing-a-source.md`).

mod error;
mod protocol;
mod server;
mod source;

pub use error::TcpError;
pub use protocol::{Answer, Hello, Query, Status};
pub use server::serve;
pub use source::{TcpOptions, TcpSource};
