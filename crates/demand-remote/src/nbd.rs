// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exports of NBD servers as sources of pages.
