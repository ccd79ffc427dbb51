// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![deny(unused_must_use)]

use std::sync::Arc;

use demand_memory::{Fill, FillRate, Pager};

fn fill(pager: Arc<Pager>) {
    Fill::start(vec![pager], FillRate::Unlimited).unwrap();
}

fn main() {}
