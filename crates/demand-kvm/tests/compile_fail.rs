// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wrong orders that do not compile.

use test_support::host::is_lab;

#[test]
fn wrong_orders_do_not_compile() {
    if is_lab() {
        return println!("it needs a compiler, which the lab's machine lacks; it runs on the host");
    }
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
