// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exports of NBD servers as sources of pages.
//!
//! The client speaks the fixed newstyle protocol, with TLS by `STARTTLS`, structured replies, and
//! the metadata context `base:allocation`, which tells zeros from data. It also reads from servers
//! without the last two: all of an export is data then. It writes nothing.
//!
//! A server is not trusted: each length and number that it sends is checked, and a violation of the
//! protocol ends the connection with an error.

mod connection;
mod error;
mod extents;
mod flight;
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod holes;
mod location;
mod option;
mod options;
mod piece;
mod protocol;
mod queue;
mod reply;
mod source;
mod stream;
mod tls;

pub use error::{Errno, NbdError, NbdErrorKind, Refusal};
pub use location::{Location, LocationError};
pub use options::{ClientCertificate, NbdOptions, TlsOptions};
pub use source::NbdSource;
