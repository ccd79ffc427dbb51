// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The API's server on real sockets, with correct, incorrect, slow and many clients. Behind it is
//! not a VM but a record of the requests.

mod connections;
mod description;
mod empty;
mod harness;
mod hostile;
mod limits;
mod programs;
mod requests;
mod streams;
